"""Jobs on TPU VMs of Google Cloud, through queued resources.

  python launch/gcloud.py start --name NAME --project P --zone Z --topology v5p:4x4x4 \\
    sft configs/sft_7b.py --workdir gs://BUCKET/RUN --init gs://BUCKET/base --data.train gs://BUCKET/shards \\
    --accumulate 2
  python launch/gcloud.py logs --name NAME --project P --zone Z

`start` looks at the queued resource first and continues from there: it creates it where there is none or it was
preempted, waits until it is active, copies the commit that is checked out, sets up every host, and starts the job on
all of them as a systemd service that restarts it on every status but 0, 2 and 3. Run it again after any failure, and
after a preemption: the run resumes from its newest checkpoint. A job that runs is left alone. `stop` saves and keeps
the slices; `start` then starts the job again. With --dry-run all commands are printed and none is run.
"""

import argparse
import subprocess
import sys
import time
from typing import Any

from commands import exported_commit, main, query, query_json, run
from job import SYSTEMS, Job, add_arguments, job_of

from avocado_jax.errors import InputError

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
POLL_SECONDS = 30
ATTEMPTS = 20  # polls in a row that fail
UNPACK = (
    "(sudo systemctl stop avocado 2>/dev/null || true) && mkdir -p avocado_jax && cd avocado_jax"
    " && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && tar -xzf ../avocado.tar.gz"
)
VERBS = {
    "start": "create the slices or continue with those there are, and start the job",
    "logs": "follow the log of a host",
    "status": "of the queued resource, and of the job on every host",
    "stop": "end the step, save, and keep the slices",
    "delete": "delete the slices",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gcloud.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb, meaning in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, allow_abbrev=False)
        one.add_argument("--name", required=True, help="of the queued resource")
        one.add_argument("--project", required=True)
        one.add_argument("--zone", required=True)
        one.add_argument("--dry-run", action="store_true", help="print the commands, run none")
        if verb == "start":
            one.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
            one.add_argument("--service-account", metavar="EMAIL", help="the identity of the hosts")
            add_arguments(one)
        if verb == "logs":
            one.add_argument("--slice", type=int, default=0, metavar="I", help="which slice")
            one.add_argument("--host", type=int, default=0, metavar="I", help="which host of the slice")
    return made


def verbs(args: argparse.Namespace) -> None:
    """Run a verb."""
    if args.verb == "start":
        start(args, job_of(args, args.project))
    elif args.verb == "logs":
        follow = "sudo journalctl --unit avocado --output cat --lines 50 --follow"
        run(_ssh(args, follow, str(args.slice), str(args.host)), args.dry_run)
    elif args.verb == "status":
        run([*QUEUED, "describe", args.name, *_where(args), "--format=value(state.state)"], args.dry_run)
        run(_ssh(args, "systemctl is-active avocado || true"), args.dry_run)
    elif args.verb == "stop":
        run(_ssh(args, "sudo systemctl disable --now avocado"), args.dry_run)
    else:
        run(_delete(args), args.dry_run)


def start(args: argparse.Namespace, job: Job) -> None:
    """Bring the job to the state in which it runs on every host, from whatever state it is in."""
    create_slices(args, job)
    active = query(_ssh(args, "systemctl is-active avocado || true"), args.dry_run)
    states = {word for word in (active or "").split() if word in ("active", "activating", "inactive", "failed")}
    if states and states <= {"active", "activating"}:
        print(f"{args.name}: the job runs on every host; `stop` it to start another")
        return
    with exported_commit(args.dry_run) as folder:
        everywhere = ["--node=all", "--worker=all", *_where(args)]
        run([*QUEUED, "scp", "avocado.tar.gz", f"{args.name}:", *everywhere], args.dry_run, cwd=folder)
    run(_ssh(args, f"{UNPACK} && bash launch/setup.sh {' '.join(job.extras)}"), args.dry_run)
    run(_ssh(args, f"cd avocado_jax && bash launch/service.sh {job.command}"), args.dry_run)


def create_slices(args: argparse.Namespace, job: Job) -> None:
    """Wait until the slices are active. Create them where there are none, or they were preempted.

    Raises:
        InputError: others of this name exist, or the new ones failed.
        subprocess.CalledProcessError: a command failed, or polling did `ATTEMPTS` times in a row.
    """
    if args.dry_run:
        _find(args)
        run(_create(args, job), dry=True)
        return
    created, before, failures = False, None, 0
    while True:
        try:
            found = _find(args)
        except subprocess.CalledProcessError:
            if (failures := failures + 1) == ATTEMPTS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        failures = 0
        state = found["state"]["state"] if found else "absent"
        if state != before:
            print(f"{args.name}: {state}", file=sys.stderr, flush=True)
        before = state
        if state in ("absent", "FAILED", "SUSPENDED"):
            if created:
                raise InputError(f"{args.name} is {state}; `status` and the console have the reason")
            if found:
                run(_delete(args), dry=False)
            run(_create(args, job), dry=False)
            created = True
            continue
        if state not in ("SUSPENDING", "DELETING"):
            _check_same(found, args, job)
        if state == "ACTIVE":
            return
        time.sleep(POLL_SECONDS)


def _find(args: argparse.Namespace) -> dict[str, Any] | None:
    """The queued resource; None where there is none."""
    listed = query_json([*QUEUED, "list", *_where(args), "--format=json"], args.dry_run)
    return next((one for one in listed or [] if one["name"].split("/")[-1] == args.name), None)


def _check_same(found: dict[str, Any], args: argparse.Namespace, job: Job) -> None:
    (spec,) = found["tpu"]["nodeSpec"]
    count = int((spec.get("multisliceParams") or spec.get("multiNodeParams") or {}).get("nodeCount", 1))
    there, wanted = (count, spec["node"]["acceleratorType"]), (job.slices, job.tpu_slice.accelerator)
    if there != wanted:
        differ = "{} x {}, not {} x {}".format(*there, *wanted)
        raise InputError(f"{args.name} is {differ}: `delete` it first; the run resumes on the new slices")


def _create(args: argparse.Namespace, job: Job) -> list[str]:
    nodes = [f"--node-id={args.name}"]
    if job.slices > 1:
        nodes = [f"--node-count={job.slices}", f"--node-prefix={args.name}"]
    nodes += [
        f"--accelerator-type={job.tpu_slice.accelerator}",
        f"--runtime-version={SYSTEMS[job.tpu_slice.generation]}",
    ]
    nodes += ["--spot"] if args.spot else []
    nodes += [f"--service-account={args.service_account}"] if args.service_account else []
    return [*QUEUED, "create", args.name, *_where(args), *nodes]


def _delete(args: argparse.Namespace) -> list[str]:
    return [*QUEUED, "delete", args.name, *_where(args), "--force", "--quiet"]


def _ssh(args: argparse.Namespace, command: str, node: str = "all", worker: str = "all") -> list[str]:
    return [*QUEUED, "ssh", args.name, *_where(args), f"--node={node}", f"--worker={worker}", f"--command={command}"]


def _where(args: argparse.Namespace) -> list[str]:
    return [f"--project={args.project}", f"--zone={args.zone}"]


if __name__ == "__main__":
    sys.exit(main(parser(), verbs))
