"""What the launchers would run: every command, manifest and flag, field by field; and what they refuse."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import job
import make_jobset
import pytest
import rehearse
import yaml

ROOT = Path(__file__).parents[2]

MAIN = {name: importlib.import_module(name) for name in ("gcloud", "gke", "sky")}
JOBSET = (ROOT / "tests/launch/jobset.yaml").read_text()
DATA = "--init gs://bucket/base --data.train gs://bucket/shards --accumulate 2"
STAGE = f"sft configs/sft_7b.py --workdir gs://bucket/run --topology v5p:4x4x4 {DATA}"
RUN = f"sft configs/sft_7b.py --workdir gs://bucket/run --coordinator auto --devices 64 {DATA}"
ENV = f"env AVOCADO_LAUNCH={make_jobset.LAUNCH}"
ACCOUNT = "--service-account a@my-project.iam.gserviceaccount.com"
WHERE = "--name run1 --project my-project --zone us-east5-a"
CLUSTER = "--cluster c1 --project my-project --zone us-east5-a"
TWO = "sft configs/sft_7b.py --workdir gs://bucket/run --coordinator auto --devices 128 "
TWO += f"{make_jobset.DATA} --mesh.slices 2"
DRY = {
    "gcloud": [
        f"start {WHERE} --dry-run {STAGE}",
        f"resume {WHERE} --dry-run --spot {ACCOUNT} {make_jobset.STAGE}",
        f"logs {WHERE} --dry-run --slices 2 --host 1",
        f"status {WHERE} --dry-run --slices 2",
        f"stop {WHERE} --dry-run --slices 2",
        f"delete {WHERE} --dry-run --slices 2",
    ],
    "gke": [
        f"cluster {CLUSTER} --topology v6e:8x8 --slices 2 --spot --dry-run",
        "image --image registry/avocado:1 --dry-run",
        make_jobset.JOB,
        "logs --name run1 --dry-run",
        f"status {CLUSTER} --dry-run",
        f"delete {CLUSTER} --name run1 --dry-run",
    ],
    "sky": [
        f"start --name run1 --zone us-east5-a --on-demand --slices 1 --unplanned --dry-run {STAGE}",
        "logs --name run1 --dry-run",
        "status --dry-run",
        "delete --name run1 --dry-run",
    ],
}


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """`launch(script, words)` gives status, stdout and stderr; xpk is one that gives what xpk was recorded to give."""
    fake, recorded = tmp_path / "xpk", ROOT / "tests/launch/jobset.yaml"
    given = 'for one; do case $one in --output-manifest-file=*) tail -n +2 RECORDED >"${one#*=}" ;; esac; done'
    fake.write_text("#!/bin/sh\n" + given.replace("RECORDED", str(recorded)) + "\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("AVOCADO_LAUNCH", make_jobset.LAUNCH)

    def run(script, words):
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
        status = job.main(MAIN[script].parser(), MAIN[script].run)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, all_ in DRY.items() for words in all_])
def test_a_dry_run_prints_commands_and_runs_none(launch, monkeypatch, script, words):
    real = subprocess.run

    def only_xpk(command, **options):
        assert command[0] == "xpk"
        assert "--dry-run" in command
        return real(command, **options)

    monkeypatch.setattr(job.subprocess, "run", only_xpk)
    status, out, err = launch(script, words)
    assert status == 0, err
    assert out.strip()
    for line in out.splitlines():
        if line.startswith(("gcloud ", "xpk ", "sky ", "kubectl ", "docker ", "git ")):
            assert shlex.join(shlex.split(line)) == line  # every argument quoted


@pytest.mark.parametrize("script", MAIN)
def test_every_flag_is_exercised(script):
    given = {word for words in DRY[script] for word in shlex.split(words)}
    verbs = MAIN[script].parser()._subparsers._group_actions[0].choices
    for verb, one in verbs.items():
        assert verb in given
        flags = {flag for action in one._actions for flag in action.option_strings} - {"-h", "--help"}
        assert flags <= given, flags - given


def test_gcloud_field_by_field(launch):
    _, out, err = launch("gcloud", DRY["gcloud"][0])
    assert "planned: fits yes, GiB a chip 17.9, of 95, step 18.7 s" in err
    create, wait, archive, copy, setup, start = map(shlex.split, out.splitlines())
    where = {"--project=my-project", "--zone=us-east5-a"}
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1"]
    slice_ = {"--node-id=run1", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"}
    assert {*create[6:]} == where | slice_
    assert wait[:7] == ["until", "gcloud", "compute", "tpus", "queued-resources", "describe", "run1"]
    assert archive[:2] == ["git", "archive"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6] == "run1:avocado.tar.gz"
    for ssh in (setup, start):
        assert ssh[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run1"]
        assert {*ssh[6:-1]} == where | {"--worker=all"}
    assert setup[-1].endswith("&& bash avocado_jax/launch/setup.sh")
    assert start[-1] == f"--command={ENV} bash avocado_jax/launch/service.sh {RUN}"
    assert 'bash launch/worker.sh "$@"' in (ROOT / "launch/service.sh").read_text()


def test_gcloud_resumes_on_several_spot_slices(launch):
    _, out, _ = launch("gcloud", DRY["gcloud"][1])
    delete, create, *_, first, second = map(shlex.split, out.splitlines())
    assert delete[4:6] == ["delete", "run1"]
    assert {"--force", "--quiet"} < {*delete}
    account = "--service-account=a@my-project.iam.gserviceaccount.com"
    assert {"--node-count=2", "--node-prefix=run1", "--spot", account} < {*create}
    assert (first[5], second[5]) == ("run1-0", "run1-1")
    assert first[-1] == second[-1] == f"--command={ENV} bash avocado_jax/launch/service.sh {TWO}"


def test_the_service_starts_again_on_all_but_0_2_and_3():
    text = (ROOT / "launch/service.sh").read_text()
    assert {"Restart=on-failure", 'RestartPreventExitStatus="2 3"'} < {
        *re.findall(r'--property=(\w+=(?:"[^"]*"|\S+))', text)
    }
    assert '--setenv=AVOCADO_LAUNCH="${AVOCADO_LAUNCH-}"' in text


def test_jobset_field_by_field(launch):
    """The manifest that xpk 1.16.0 made of the very command that is printed today."""
    _, out, _ = launch("gke", DRY["gke"][2])
    assert f"# {out.splitlines()[0]}" == JOBSET.splitlines()[0], "run tests/make_jobset.py again"
    assert out.partition("\n")[2] == JOBSET.partition("\n")[2]
    made = yaml.safe_load(JOBSET)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["name"] == "avocado-sft"
    spec = made["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == job.RESTARTS
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
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert pod["terminationGracePeriodSeconds"] > 90  # what the loop gives itself to save (train/stop.py)
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["image"] == "registry/avocado:1"
    assert hosts["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 64
    assert hosts["completions"] == hosts["parallelism"]
    assert f"(exec {ENV} bash launch/worker.sh {TWO}) & PID=$!;" in container["command"][2]


def test_sky_field_by_field(launch):
    _, out, _ = launch("sky", DRY["sky"][0])
    command, _, text = out.partition("\n")
    assert shlex.split(command)[:6] == ["sky", "jobs", "launch", "--name=run1", "--yes", "--detach-run"]
    task = yaml.safe_load(text)
    recovery = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 0}
    assert task == {
        "name": "run1",
        "workdir": ".",
        "resources": {
            "infra": "gcp/us-east5/us-east5-a",
            "accelerators": "tpu-v5p-128",
            "accelerator_args": {"runtime_version": "v2-alpha-tpuv5"},
            "use_spot": False,
            "job_recovery": recovery | {"recover_on_exit_codes": [1, *range(4, 256)]},
        },
        "setup": "bash launch/setup.sh",
        "run": f"{ENV} bash launch/worker.sh {RUN}",
    }
    assert yaml.safe_load(launch("sky", f"start --name run1 --dry-run {STAGE}")[1].partition("\n")[2])["resources"][
        "use_spot"
    ]


@pytest.mark.parametrize("stage", rehearse.CONFIGS)
def test_the_rehearsal_runs_the_launchers_command(launch, stage):
    """In one launch: `launch` sets its name."""
    words = rehearse.job(stage, "gs://bucket/broken", rehearse.FOUR)
    config, more = rehearse.CONFIGS[stage]
    given = f"{stage} {config} --workdir gs://bucket/broken --topology {rehearse.FOUR} --unplanned "
    given += shlex.join([*rehearse.FIELDS, *more])
    _, out, _ = launch("sky", f"start --name run1 --dry-run {given}")
    assert yaml.safe_load(out.partition("\n")[2])["run"] == shlex.join(words)
    _, out, _ = launch("gcloud", f"start {WHERE} --dry-run {given}")
    assert shlex.split(out.splitlines()[-1])[-1].partition("service.sh ")[2] == shlex.join(words[4:])


START = f"start {WHERE} {STAGE}"


def instead(old, new):
    assert old in START
    return START.replace(old, new)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (instead("gs://bucket/run", "'gs://buc ket/run'"), "--workdir 'gs://buc ket/run': not gs://BUCKET/RUN"),
        (instead("gs://bucket/run", "'gs://bucket;x/run'"), "--workdir 'gs://bucket;x/run': not gs://BUCKET/RUN"),
        (instead("gs://bucket/run", "'gs://bucket/a;b'"), "--workdir 'gs://bucket/a;b'"),
        (instead("gs://bucket/run", "gs://bucket"), "not gs://BUCKET/RUN"),
        (instead("gs://bucket/run", "runs/here"), "not gs://BUCKET/RUN"),
        (instead("gs://bucket/base", "'gs://b;/x'"), "--init 'gs://b;/x'"),
        (instead("gs://bucket/base", "runs/base"), "hosts share no disk"),
        (f"{START} --data.heldout runs/held", "--data.heldout 'runs/held'"),
        (instead("my-project", "My_Project"), "--project 'My_Project'"),
        (instead("us-east5-a", "us-east5"), "--zone 'us-east5'"),
        (instead("run1", "'$(id)'"), "--name '$(id)'"),
        (instead("4x4x4", "3x3x3"), "--topology 'v5p:3x3x3': not one of v5e: 2x4"),
        (instead("v5p:4x4x4", "v4:2x2x2"), "not one of"),
        (f"{START} --slices 0", "--slices 0: at least 1"),
        (f"{START} --mesh.slices 2", "follows from --slices"),
        (f"{START} --mesh.tensor 3", "is not 64 chips"),
        (f"{START} --accumulate 3", "128 rows are not divided by data x fsdp x accumulate = 192"),
        (f"{START} --accumulat 3", "did you mean accumulate?"),
        (instead("configs/sft_7b.py", "configs/../x.py"), "a file of configs/"),
        (instead("sft_7b", "no_such"), "no such config file"),
        (instead("sft_7b", "grpo_7b"), "a GrpoConfig; sft takes a SftConfig"),
        (instead("v5p:4x4x4", "v5e:8x8").replace(" --accumulate 2", ""), "does not fit v5e:8x8: fits no, by 14.3"),
        (f"{START} --remat dots", "has no plan of this: run `avocado plan configs/sft_7b.py"),
        (f"start {WHERE} {make_jobset.STAGE.replace('--unplanned', '')}", "--mesh.slices 2` and add its line"),
        (f"logs {WHERE} --hosts 1", "unrecognized: --hosts 1"),
    ],
)
def test_refusals_are_one_line(launch, monkeypatch, words, complaint):
    refused(launch, monkeypatch, "gcloud", words, complaint)


@pytest.mark.parametrize(
    ("script", "words", "complaint"),
    [
        ("gke", "image --image 'a b:1'", "--image 'a b:1': not REGISTRY/NAME:TAG"),
        ("gke", f"cluster {CLUSTER} --topology v5p:4x4x4".replace("c1", "C1"), "--cluster 'C1'"),
        ("sky", f"start --name run1 {make_jobset.STAGE}", "SkyPilot takes one slice"),
    ],
)
def test_refusals_of_the_others(launch, monkeypatch, script, words, complaint):
    refused(launch, monkeypatch, script, words, complaint)


def refused(launch, monkeypatch, script, words, complaint):
    monkeypatch.setattr(job.subprocess, "run", lambda command, **_: pytest.fail(f"ran {command[0]}"))
    status, out, err = launch(script, words)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("planned: ")]
    assert complaint in line


def test_a_tool_that_is_absent_or_fails(launch, monkeypatch):
    status, _, err = launch("gke", f"status {CLUSTER}")  # the recorded xpk does nothing, well
    assert (status, err) == (0, "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("gke", f"status {CLUSTER}")[::2] == (2, "gke.py: xpk: not installed\n")
    assert "pip install xpk" in launch("gke", DRY["gke"][2])[2]


def test_every_plan_of_the_table_is_understood():
    """Each line is found again by what it was planned for."""
    found = list(job.plans())
    assert len(found) >= 6
    for (path, *rest), told in found:
        at = rest.index("--topology")
        fields = rest[:at] + rest[at + 2 :]
        config = job.load(str(ROOT / path), fields)
        if told["fits"].startswith("yes"):
            assert job.planned(path, rest[at + 1], config, fields)
        else:
            with pytest.raises(job.InputError, match="does not fit"):
                job.planned(path, rest[at + 1], config, fields)
        job.slice_of(rest[at + 1])


def test_shell_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "-x", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_no_secret_and_nobody_s_name():
    """Nothing of a project, an account or a machine in what is shipped: they are arguments."""
    for path in sorted((ROOT / "launch").iterdir()):
        text = path.read_text() if path.is_file() else ""
        assert not re.search(r"AIza|BEGIN [A-Z ]*PRIVATE KEY|private_key|ya29\.|/home/|/root/", text), path
        assert not re.search(r"@(?!PROJECT\b)[\w-]+\.iam\.gserviceaccount\.com", text), path
