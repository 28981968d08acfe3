"""What the launchers run and submit: commands, manifests, flags, and what they refuse."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import commands
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
        f"start --name run1 --zone us-east5-a --on-demand --dry-run {SFT} --slices 1 --unplanned",
        "logs --name run1 --dry-run",
        "status --dry-run",
        "delete --name run1 --dry-run",
    ],
}


@pytest.fixture
def launch(monkeypatch, capsys):
    """`launch(script, words)` gives status, stdout and stderr. xpk renders what was recorded; nothing else runs."""

    def run(command, **_):
        assert command[0] == "xpk", f"ran {command}"
        options = dict(word.split("=", 1) for word in command if "=" in word)
        text = (make_manifests.MANIFESTS / f"gke-{options['--workload']}.yaml").read_text()
        Path(options["--output-manifest-file"]).write_text(text[text.index("apiVersion") :])
        return subprocess.CompletedProcess(command, 0, "", "")

    for name, value in make_manifests.ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", run)

    def launched(script, words):
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
        status = commands.main(SCRIPTS[script].parser(), SCRIPTS[script].verbs)
        return status, *capsys.readouterr()

    return launched


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, all_ in DRY.items() for words in all_])
def test_a_dry_run_prints_commands_and_runs_none(launch, script, words):
    status, out, err = launch(script, words)
    assert status == 0, err
    assert out.strip()
    for line in out.splitlines():
        if line.startswith(("gcloud ", "xpk ", "sky ", "kubectl ", "docker ")):
            assert shlex.join(shlex.split(line)) == line  # every argument is quoted


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_exercised(script):
    given = {word for words in DRY[script] for word in shlex.split(words)}
    for verb, one in SCRIPTS[script].parser()._subparsers._group_actions[0].choices.items():
        assert verb in given
        flags = {flag for action in one._actions for flag in action.option_strings} - {"-h", "--help"}
        assert flags <= given, flags - given


@pytest.mark.parametrize(("launcher", "stage"), make_manifests.JOBS)
def test_manifests_are_those_that_xpk_and_skypilot_have_read(launch, launcher, stage):
    status, out, err = launch(launcher, make_manifests.JOBS[launcher, stage])
    assert status == 0, err
    text = (make_manifests.MANIFESTS / f"{launcher}-{stage}.yaml").read_text()
    assert make_manifests.recorded(out) == text, "run tests/make_manifests.py again"
    assert make_manifests.ENV["WANDB_API_KEY"] not in text + err
    assert "WANDB_API_KEY" in text


def test_no_command_of_gcloud_has_the_key(launch):
    _, out, err = launch("gcloud", DRY["gcloud"][0])
    assert make_manifests.ENV["WANDB_API_KEY"] not in out + err
    assert "AVOCADO_SECRETS=my-project/WANDB_API_KEY" in out


def worker_words(chips, more):
    """The stage `sft` as every host runs it."""
    words = (
        f"sft configs/sft_7b.py --workdir gs://bucket/sft --coordinator auto --devices {chips} --init gs://bucket/base"
    )
    return f"{words} --data.train gs://bucket/shards{more}"


def test_gcloud_field_by_field(launch):
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


def test_jobset_field_by_field():
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
def test_gke_finds_no_difference_in_its_own_jobset(stage):
    """As xpk renders it: the fake of test_start_again.py is shorter."""
    words = make_manifests.JOBS["gke", stage].replace("--env WANDB_ENTITY", "")
    args, fields = SCRIPTS["gke"].parser().parse_known_args(words.split())
    made = yaml.safe_load(
        (make_manifests.MANIFESTS / f"gke-{stage}.yaml").read_text().replace("'WANDB_ENTITY=a team' ", "")
    )
    of_job = job.job_of(args, fields, args.project)
    assert SCRIPTS["gke"].differences(made, args.image, of_job) == ""
    assert SCRIPTS["gke"].differences(made, "other:1", of_job) == "image"


def test_the_image_has_the_platform_and_the_extras(launch):
    _, out, _ = launch("gke", DRY["gke"][1])
    build, push = map(shlex.split, out.splitlines())
    assert {"--platform=linux/amd64", "--build-arg=EXTRAS=tpu,wandb,world", "--tag=registry/avocado:1"} < {*build}
    assert push == ["docker", "push", "registry/avocado:1"]
    _, out, _ = launch("gke", DRY["gke"][0])
    account = "--custom-nodepool-arguments=--service-account=a@my-project.iam.gserviceaccount.com"
    assert {"--tpu-type=v6e-64", "--num-slices=2", "--spot", account} < {*shlex.split(out)}


def test_logs_and_status_of_a_cluster_do_not_use_the_current_context(launch):
    for words in DRY["gke"][3:]:
        *_, credentials, command = map(shlex.split, launch("gke", words)[1].splitlines())
        assert credentials[3:5] == ["get-credentials", "c1"]
        assert command[1] == "--context=gke_my-project_us-east5_c1"


def test_sky_task_field_by_field(launch):
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
def test_sky_restarts_all_but_0_2_and_3(status, ends):
    """SkyPilot records 137 for hosts that it kills itself, so that status may not be one that is restarted."""
    _, last = SCRIPTS["sky"].TASK.partition("{command}\n")[::2]
    assert subprocess.run(["bash", "-c", f"(exit {status})\n{last}"], check=False).returncode == ends


@pytest.mark.parametrize(("config", "extras"), [("world_tiny", ("tpu", "world")), ("sft_7b", ("tpu",))])
def test_voices_are_installed_where_clips_are_generated(config, extras):
    words = f"sft configs/{config}.py --workdir gs://bucket/run --topology v6e:2x2 --unplanned --batch 16"
    words += " --init gs://bucket/base" + (" --data.train gs://bucket/shards" if config == "sft_7b" else "")
    args, fields = SCRIPTS["sky"].parser().parse_known_args(["start", "--name", "a", *words.split()])
    assert job.job_of(args, fields).extras == extras


@pytest.mark.parametrize("stage", rehearse.CONFIGS)
def test_the_rehearsal_runs_the_launchers_command(launch, stage):
    words = rehearse.job(stage, "gs://bucket/broken", rehearse.FOUR)
    config, more = rehearse.CONFIGS[stage]
    given = f"{stage} {config} --workdir gs://bucket/broken --topology {rehearse.FOUR} --unplanned "
    given += shlex.join([*rehearse.FIELDS, *more])
    _, out, _ = launch("sky", f"start --name run1 --dry-run {given}")
    assert yaml.safe_load(out[out.index("name:") :])["run"].splitlines()[0] == shlex.join(words)
    _, out, _ = launch("gcloud", f"start {WHERE} --dry-run {given}")
    assert shlex.split(out.splitlines()[-1])[-1].partition("service.sh ")[2] == shlex.join(words)


DATA = "--init gs://bucket/base --data.train gs://bucket/shards --accumulate 2"
START = f"start {WHERE} sft configs/sft_7b.py --workdir gs://bucket/run --topology v5p:4x4x4 {DATA}"
CAPTION = f"start {WHERE} caption gs://bucket/clips --topology v6e:2x2 --out gs://bucket/captions"


def instead(old, new, words=START):
    assert old in words
    return words.replace(old, new)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (instead("gs://bucket/run", "'gs://buc ket/run'"), "--workdir 'gs://buc ket/run': not gs://BUCKET/RUN"),
        (instead("gs://bucket/run", "'gs://bucket;x/run'"), "--workdir 'gs://bucket;x/run': not gs://BUCKET/RUN"),
        (instead("gs://bucket/run", "gs://bucket"), "not gs://BUCKET/RUN"),
        (instead("--workdir gs://bucket/run", ""), "sft: --workdir gs://BUCKET/RUN is required"),
        (instead("gs://bucket/base", "'gs://b;/x'"), "--init 'gs://b;/x'"),
        (instead("gs://bucket/base", "runs/base"), "hosts share no disk"),
        (f"{START} --data.heldout runs/held", "--data.heldout 'runs/held'"),
        (instead("my-project", "My_Project"), "--project 'My_Project'"),
        (instead("us-east5-a", "us-east5"), "--zone 'us-east5'"),
        (instead("run1", "'$(id)'"), "--name '$(id)'"),
        (instead("4x4x4", "3x3x3"), "--topology 'v5p:3x3x3': not one of v5e: 2x4"),
        (f"{START} --slices 0", "--slices 0: at least 1"),
        (f"{START} --mesh.slices 2", "follows from --slices"),
        (f"{START} --mesh.tensor 3", "is not 64 chips"),
        (f"{START} --accumulate 3", "128 rows are not divided by data x fsdp x accumulate = 192"),
        (f"{START} --accumulat 3", "did you mean accumulate?"),
        (instead("configs/sft_7b.py", "configs/../x.py"), "not a file of configs/"),
        (instead("sft_7b", "no_such"), "no such config file"),
        (instead("sft_7b", "grpo_7b"), "a GrpoConfig; sft takes a SftConfig"),
        (instead("v5p:4x4x4", "v5e:8x8").replace(" --accumulate 2", ""), "does not fit v5e:8x8: 30.1 of 15.75 GiB"),
        (f"{START} --remat dots", "has no plan of this: run `avocado plan configs/sft_7b.py"),
        (instead("--accumulate 2", "--slices 2"), "--mesh.slices 2` and add its result"),
        (f"{START} --env NOT_SET_HERE", "--env NOT_SET_HERE: not an environment variable that is set here"),
        (f"{START} --env WANDB_API_KEY", "--env WANDB_API_KEY: looks like a key; pass it as --secret"),
        (f"{START} --secret 'A=b'", "--secret 'A=b': not the name of an environment variable"),
        (f"{START} --wandb 'two\nlines'", "a line break"),
        (f"{CAPTION} --workdir gs://bucket/run", "--workdir: of sft and grpo, not of caption"),
        (f"{CAPTION} --slices 2", "caption: takes one host"),
        (instead("2x2", "4x4", CAPTION), "for more, start several jobs with --shard I/N"),
        (instead("gs://bucket/captions", "captions", CAPTION), "--out 'captions': the host's disk is temporary"),
        (f"start {WHERE} prepare gs://bucket/c.jsonl --topology v6e:2x2", "prepare: OUT ''"),
        (f"logs {WHERE} --hosts 1", "unrecognized: --hosts 1"),
    ],
)
def test_refusals_are_one_line(launch, words, complaint):
    refused(launch, "gcloud", words, complaint)


@pytest.mark.parametrize(
    ("script", "words", "complaint"),
    [
        ("gke", "image --image 'a b:1'", "--image 'a b:1': not REGISTRY/NAME:TAG"),
        ("gke", f"cluster {CLUSTER} --topology v5p:4x4x4".replace("c1", "C1"), "--cluster 'C1'"),
        ("sky", f"start --name run1 {make_manifests.SLICES}", "SkyPilot takes one slice"),
        ("sky", f"start --name run1 {SFT} --secret OPENAI_API_KEY_NOT_SET", "OPENAI_API_KEY_NOT_SET: not set here"),
    ],
)
def test_refusals_of_the_others(launch, script, words, complaint):
    refused(launch, script, words, complaint)


def refused(launch, script, words, complaint):
    status, out, err = launch(script, words)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("planned: ")]
    assert complaint in line


def test_a_tool_that_is_absent(launch, monkeypatch):
    def absent(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", absent)
    status, _, err = launch("gke", f"status {CLUSTER}")
    assert (status, err) == (2, "gke.py: gcloud: not installed\n")
    assert "pip install xpk" in launch("gke", DRY["gke"][2])[2]


def test_the_table_of_plans_is_printed_from_the_json_file():
    (found,) = plans.TABLE.finditer((ROOT / "launch/README.md").read_text())
    assert found[0] == found[1] + plans.table() + found[2], "run: python launch/plans.py --write"


def test_hours_follow_from_the_steps_of_the_configs():
    """107 thousand captions twice in batches of 128; 2,000 clips once, 8 a step."""
    text = (ROOT / "launch/README.md").read_text()
    for stage, steps in (("sft", 1672), ("grpo", 250)):
        assert plans.steps(f"configs/{stage}_7b.py", []) == steps
        assert f"| {steps:,} steps of " in text
    (sft,) = (line for line in plans.table().splitlines() if "sft_7b.py --topology v5p:4x4x4 --accumulate 2`" in line)
    assert sft.endswith(f"| 18.7 s | compute | 50% | {1672 * 18.7 / 3600:.1f} | {64 * 1672 * 18.7 / 3600:.0f} |")


def test_every_plan_is_found():
    for plan in plans.read_plans():
        wanted = plan["config"], plan["topology"], plan["fields"]
        if plan["fits"]:
            assert f"at most {plan['seconds']} s" in plans.find_plan(*wanted)
        else:
            with pytest.raises(job.InputError, match="does not fit"):
                plans.find_plan(*wanted)
        job.slice_of(plan["topology"])


def test_shell_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    shellcheck = [Path(sys.executable).parent / "shellcheck", "-x", *scripts]
    done = subprocess.run(shellcheck, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_secret_and_no_name_of_a_person():
    """Projects, accounts and machines are arguments."""
    for path in sorted((ROOT / "launch").iterdir()):
        text = path.read_text() if path.is_file() else ""
        assert not re.search(r"AIza|BEGIN [A-Z ]*PRIVATE KEY|private_key|ya29\.|/home/|/root/", text), path
        assert not re.search(r"@(?!PROJECT\b)[\w-]+\.iam\.gserviceaccount\.com", text), path
