"""Commands, manifests and flags of the launchers."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import job
import make_manifests
import plans
import pytest
import rehearse
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = {name: importlib.import_module(name) for name in ("gcloud", "gke", "sky")}
WHERE = "--name run1 --project my-project --zone us-east5-a"
CLUSTER = "--cluster c1 --project my-project --zone us-east5-a"
ACCOUNT = "--service-account a@my-project.iam.gserviceaccount.com"
SFT = make_manifests.STAGES["sft"]
DRY = {
    "gcloud": [
        f"start {WHERE} --dry-run {SFT}",
        f"start {WHERE} --dry-run --spot {ACCOUNT} {make_manifests.SLICES}",
        f"logs {WHERE} --dry-run --slice 1 --host 3",
        f"status {WHERE} --dry-run",
        f"stop {WHERE} --dry-run",
        f"delete {WHERE} --dry-run",
    ],
    "gke": [
        f"cluster {CLUSTER} --topology v6e:8x8 --slices 2 --spot {ACCOUNT} --dry-run",
        "image --image registry/avocado:1 --extra wandb --extra world --dry-run",
        make_manifests.JOBS["gke", "slices"],
        f"logs {CLUSTER} --name run1 --dry-run",
        f"status {CLUSTER} --dry-run",
        f"delete {CLUSTER} --name run1 --dry-run",
    ],
    "sky": [
        f"start --name run1 --zone us-east5-a --on-demand --dry-run --slices 1 --unplanned {SFT}",
        "logs --name run1 --dry-run",
        "status --dry-run",
        "delete --name run1 --dry-run",
    ],
}


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, all_ in DRY.items() for words in all_])
def test_dry_run_prints_commands_and_runs_none(launch, script, words):
    status, out, err = launch(script, words)
    assert status == 0, err
    assert out.strip()
    for line in out.splitlines():
        if line.startswith(("gcloud ", "xpk ", "sky ", "kubectl ", "docker ")):
            assert shlex.join(shlex.split(line)) == line  # every argument is quoted


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_tested(script):
    given = {word for words in DRY[script] for word in shlex.split(words)}
    for verb, one in SCRIPTS[script].parser()._subparsers._group_actions[0].choices.items():
        assert verb in given
        flags = {flag for action in one._actions for flag in action.option_strings} - {"-h", "--help"}
        assert flags <= given, flags - given


@pytest.mark.parametrize(("launcher", "stage"), make_manifests.JOBS)
def test_manifests_equal_those_parsed_by_xpk_and_skypilot(launch, launcher, stage):
    status, out, err = launch(launcher, make_manifests.JOBS[launcher, stage])
    assert status == 0, err
    text = (make_manifests.MANIFESTS / f"{launcher}-{stage}.yaml").read_text()
    assert make_manifests.recorded(out) == text, "run tests/make_manifests.py again"
    assert make_manifests.ENV["WANDB_API_KEY"] not in text + err
    assert "WANDB_API_KEY" in text


def test_gcloud_commands_do_not_contain_the_key(launch):
    _, out, err = launch("gcloud", DRY["gcloud"][0])
    assert make_manifests.ENV["WANDB_API_KEY"] not in out + err
    assert "AVOCADO_SECRETS=my-project/WANDB_API_KEY" in out


def worker_words(chips, more):
    """The command of the stage `sft` on every host."""
    words = (
        f"sft configs/sft_7b.py --workdir gs://bucket/sft --coordinator auto --devices {chips} --init gs://bucket/base"
    )
    return f"{words} --data.train gs://bucket/shards{more}"


def test_fields_of_gcloud_commands(launch):
    _, out, err = launch("gcloud", DRY["gcloud"][0])
    (plan,) = (
        one for one in plans.read_plans() if (one["topology"], one["fields"]) == ("v5p:4x4x4", ["--accumulate", "2"])
    )
    assert f"planned: {plan['gib']} of 95.0 GiB a chip, at most {plan['seconds']} s a step" in err
    find, create, active, copy, setup, start = map(shlex.split, out.splitlines())
    queued, where = ["gcloud", "compute", "tpus", "queued-resources"], {"--project=my-project", "--zone=us-east5-a"}
    everywhere = where | {"--node=all", "--worker=all"}
    assert find == [*queued, "list", "--project=my-project", "--zone=us-east5-a", "--format=json"]
    assert create[:6] == [*queued, "create", "run1"]
    slice_ = {"--node-id=run1", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"}
    assert {*create[6:]} == where | slice_
    assert copy[:7] == [*queued, "scp", "avocado.tar.gz", "run1:"]
    assert {*copy[7:]} == everywhere
    for ssh in (active, setup, start):
        assert ssh[:6] == [*queued, "ssh", "run1"]
        assert {*ssh[6:-1]} == everywhere
    assert setup[-1].endswith("&& bash launch/setup.sh tpu wandb")
    variables = "AVOCADO_LAUNCH=20260101-000000 'WANDB_ENTITY=a team' AVOCADO_SECRETS=my-project/WANDB_API_KEY"
    words = f"env {variables} bash launch/worker.sh {worker_words(64, ' --accumulate 2 --wandb captions')}"
    assert start[-1] == f"--command=cd avocado_jax && bash launch/service.sh {words}"


def test_gcloud_with_several_spot_slices(launch):
    _, out, _ = launch("gcloud", DRY["gcloud"][1])
    _, create, *_, start = map(shlex.split, out.splitlines())
    account = "--service-account=a@my-project.iam.gserviceaccount.com"
    assert {"--node-count=2", "--node-prefix=run1", "--spot", account} < {*create}
    assert start[-1].endswith(worker_words(128, " --wandb captions --mesh.slices 2"))
    _, out, _ = launch("gcloud", DRY["gcloud"][2])
    assert {"--node=1", "--worker=3"} < {*shlex.split(out)}


def test_fields_of_the_jobset():
    made = yaml.safe_load((make_manifests.MANIFESTS / "gke-slices.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = made["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 1000
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (slices,) = spec["replicatedJobs"]
    assert slices["replicas"] == 2
    hosts = slices["template"]["spec"]
    assert hosts["backoffLimit"] == 0
    (rule,) = hosts["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert sorted(rule["onExitCodes"]["values"]) == [1, *range(4, 256)]
    pod = hosts["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["hostNetwork"]  # hence the nodes' service account, not Workload Identity (README.md)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert pod["terminationGracePeriodSeconds"] > 90  # what the loop takes to save at most (train/stop.py)
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["image"] == "registry/avocado:1"
    assert hosts["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 64
    assert hosts["completions"] == hosts["parallelism"]
    words = worker_words(128, " --wandb captions --mesh.slices 2")
    assert f"bash launch/worker.sh {words}) & PID=$!;" in container["command"][2]


@pytest.mark.parametrize("stage", make_manifests.STAGES)
def test_gke_comparison_accepts_its_own_jobset(stage):
    """With the JobSet as rendered by xpk; the fake of test_start_again.py is shorter."""
    words = make_manifests.JOBS["gke", stage].replace("--env WANDB_ENTITY", "")
    args = SCRIPTS["gke"].parser().parse_args(words.split())
    made = yaml.safe_load(
        (make_manifests.MANIFESTS / f"gke-{stage}.yaml").read_text().replace("'WANDB_ENTITY=a team' ", "")
    )
    of_job = job.job_of(args, args.project)
    assert SCRIPTS["gke"].differences(made, args.image, of_job) == ""
    assert SCRIPTS["gke"].differences(made, "other:1", of_job) == "image"


def test_image_build_has_the_platform_and_the_extras(launch):
    _, out, _ = launch("gke", DRY["gke"][1])
    build, push = map(shlex.split, out.splitlines())
    assert {"--platform=linux/amd64", "--build-arg=EXTRAS=tpu,wandb,world", "--tag=registry/avocado:1"} < {*build}
    assert push == ["docker", "push", "registry/avocado:1"]
    _, out, _ = launch("gke", DRY["gke"][0])
    account = "--custom-nodepool-arguments=--service-account=a@my-project.iam.gserviceaccount.com"
    assert {"--tpu-type=v6e-64", "--num-slices=2", "--spot", account} < {*shlex.split(out)}


def test_logs_and_status_name_the_cluster_context(launch):
    for words in DRY["gke"][3:]:
        *_, credentials, command = map(shlex.split, launch("gke", words)[1].splitlines())
        assert credentials[3:5] == ["get-credentials", "c1"]
        assert command[1] == "--context=gke_my-project_us-east5_c1"


def test_fields_of_the_sky_task(launch):
    _, out, _ = launch("sky", DRY["sky"][0])
    task = yaml.safe_load(out[out.index("name:") :])
    assert task["resources"] == {
        "infra": "gcp/us-east5/us-east5-a",
        "accelerators": "tpu-v5p-128",
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5"},
        "use_spot": False,
        "job_recovery": {"strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["secrets"] == {"WANDB_API_KEY": None}
    assert task["setup"] == "bash launch/setup.sh tpu wandb"
    first, _ = task["run"].splitlines()
    assert first.endswith(f"bash launch/worker.sh {worker_words(64, ' --accumulate 2 --wandb captions')}")
    _, out, _ = launch("sky", f"start --name run1 --dry-run {SFT}")
    assert yaml.safe_load(out[out.index("name:") :])["resources"]["use_spot"]


@pytest.mark.parametrize(
    ("status", "ends"), [(0, 0), (2, 2), (3, 3), (1, 75), (75, 75), (134, 75), (137, 75), (143, 75), (127, 75)]
)
def test_sky_restarts_all_statuses_except_0_2_and_3(status, ends):
    """SkyPilot records 137 for hosts that it kills itself, so that status may not be one that is restarted."""
    _, last = SCRIPTS["sky"].TASK.partition("{command}\n")[::2]
    assert subprocess.run(["bash", "-c", f"(exit {status})\n{last}"], check=False).returncode == ends


@pytest.mark.parametrize(("config", "extras"), [("world_tiny", ("tpu", "world")), ("sft_7b", ("tpu",))])
def test_espeak_is_installed_if_clips_are_generated(config, extras):
    words = f"--topology v6e:2x2 --unplanned sft configs/{config}.py --workdir gs://bucket/run --batch 16"
    words += " --init gs://bucket" + (" --data.train gs://bucket/shards" if config == "sft_7b" else "")
    args = SCRIPTS["sky"].parser().parse_args(["start", "--name", "a", *words.split()])
    assert job.job_of(args).extras == extras


@pytest.mark.parametrize("stage", rehearse.CONFIGS)
def test_rehearsal_runs_the_command_of_the_launchers(launch, stage):
    words = rehearse.job(stage, "gs://bucket/broken", rehearse.FOUR)
    config, more = rehearse.CONFIGS[stage]
    given = f"--topology {rehearse.FOUR} --unplanned {stage} {config} --workdir gs://bucket/broken "
    given += shlex.join([*rehearse.FIELDS, *more])
    _, out, _ = launch("sky", f"start --name run1 --dry-run {given}")
    assert yaml.safe_load(out[out.index("name:") :])["run"].splitlines()[0] == shlex.join(words)
    _, out, _ = launch("gcloud", f"start {WHERE} --dry-run {given}")
    assert shlex.split(out.splitlines()[-1])[-1].partition("service.sh ")[2] == shlex.join(words)


@pytest.mark.parametrize(
    "words",
    [
        "caption --manifest gs://b-1/m.jsonl --checkpoint gs://b-1/c gs://b-1/a --dry-run --out gs://b-1/o --shard 1/4",
        "caption gs://bucket gs://bucket/*.mp4 --out gs://bucket/o --checkpoint ORG/NAME@main --temperature 1.0",
        "caption gs://bucket/clips --checkpoint avocado_jax/assets/captioner --out gs://bucket/captions.jsonl",
        "caption gs://bucket/clips --prompt-file gs://bucket/prompts.txt --out gs://bucket/captions",
        "prepare hub:ORG/set --tokenizer ORG/NAME gs://bucket/out --media hub:ORG/set --shard 0/2",
        "evaluate world --data gs://bucket/clips.jsonl --out gs://bucket/captions.jsonl --checkpoint ORG/NAME --json",
        "evaluate daily-omni --data gs://b-1/d --videos gs://b-1/v --out gs://b-1/o --judge-model ORG/NAME --rounds 3",
        "evaluate vdc --data gs://bucket/d.jsonl --videos gs://bucket/v --out gs://bucket/o --shard 1/4",
        "evaluate vdc --data gs://b-1/d --captions gs://b-1/c --out gs://b-1/o --judge https://H/v1 --judge-model any",
    ],
)
def test_stage_arguments_are_passed_on_verbatim(launch, words):
    _, out, err = launch("sky", f"start --name run1 --topology v6e:2x2 --dry-run {words}")
    task = yaml.safe_load(out[out.index("name:") :])
    assert shlex.split(task["run"].splitlines()[0])[2:] == ["bash", "launch/worker.sh", *words.split()], err
    # The options of the launcher come before the stage: the dry run of the first is caption's own.
    args = SCRIPTS["sky"].parser().parse_args(["start", "--name", "run1", "--topology", "v6e:2x2", *words.split()])
    assert not args.dry_run


def test_debugging_flags_of_training_reach_the_hosts(launch):
    _, out, err = launch("sky", f"start --name run1 --dry-run {SFT} --debug-nans --deterministic")
    task = yaml.safe_load(out[out.index("name:") :])
    words = shlex.split(task["run"].splitlines()[0])
    assert words[words.index("--devices") + 2 :][:2] == ["--debug-nans", "--deterministic"], err
    assert words[-2:] == ["--wandb", "captions"]


def test_gke_names_the_extras_of_the_image(launch):
    assert "gke.py: the image needs --extra wandb\n" in launch("gke", make_manifests.JOBS["gke", "sft"])[2]
    assert "the image needs" not in launch("gke", make_manifests.JOBS["gke", "grpo"])[2]


def test_shell_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    shellcheck = [Path(sys.executable).parent / "shellcheck", "-x", *scripts]
    done = subprocess.run(shellcheck, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_secrets_or_personal_names():
    """Projects, accounts and machines are arguments."""
    for path in sorted((ROOT / "launch").iterdir()):
        text = path.read_text() if path.is_file() else ""
        assert not re.search(r"AIza|BEGIN [A-Z ]*PRIVATE KEY|private_key|ya29\.|/home/|/root/", text), path
        assert not re.search(r"@(?!PROJECT\b)[\w-]+\.iam\.gserviceaccount\.com", text), path
