"""Jobs on a TPU slice that SkyPilot finds, and finds again after a preemption (pip install 'skypilot[gcp]==0.14.1').

  python launch/sky.py start --name NAME --zone Z --topology v5p:4x4x4 \\
    sft configs/sft_7b.py --workdir gs://BUCKET/RUN --init gs://BUCKET/base --data.train gs://BUCKET/shards \\
    --accumulate 2

A managed job on a spot slice: it is restarted after a preemption and on every status but 0, 2 and 3, and the run
resumes from its newest checkpoint. `start` submits the job unless one of this name has not ended: run it again after
any failure. With --dry-run all commands and the task are printed and nothing is run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from commands import exported_commit, main, query_json, run
from job import SYSTEMS, Job, add_arguments, job_of

from avocado_jax.errors import InputError

ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")  # and FAILED_...
VERBS = {
    "start": "start the job",
    "logs": "follow the logs of its hosts",
    "status": "of all managed jobs",
    "delete": "end the job and delete the slice",
}
# When a host fails, SkyPilot kills the others and records 137 for them. It restarts a job if the status of any host is
# in recover_on_exit_codes, so 137 must not be there; hence the last line of `run`, which turns all that may pass into
# 75. max_restarts_on_errors restarts on every other status, so also on 2 and 3: it must be 0. FAILOVER restarts on the
# same slice while that is up; EAGER_NEXT_REGION deletes it first.
TASK = """\
name: {name}
workdir: .
resources:
  infra: {infra}
  accelerators: {accelerator}
  accelerator_args:
    runtime_version: {system}
  use_spot: {spot}
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
secrets: {secrets}
setup: bash launch/setup.sh {extras}
run: |
  {command}
  status=$?; case $status in 0|2|3) exit $status ;; *) exit 75 ;; esac
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="sky.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb, meaning in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, allow_abbrev=False)
        one.add_argument("--dry-run", action="store_true", help="print commands and task, run nothing")
        if verb != "status":
            one.add_argument("--name", required=True, help="of the job")
        if verb == "start":
            one.add_argument("--zone", help="default: any zone that has such slices")
            one.add_argument("--on-demand", action="store_true", help="more expensive, and not preempted")
            add_arguments(one)
    return made


def verbs(args: argparse.Namespace) -> None:
    """Run a verb."""
    if args.verb == "logs":
        run(["sky", "jobs", "logs", "--name", args.name], args.dry_run)
    elif args.verb == "status":
        run(["sky", "jobs", "queue"], args.dry_run)
    elif args.verb == "delete":
        run(["sky", "jobs", "cancel", "--name", args.name, "--yes"], args.dry_run)
    else:
        start(args, job_of(args))


def start(args: argparse.Namespace, job: Job) -> None:
    """Submit the job, unless one of its name has not ended.

    Raises:
        InputError: a secret is not set, or there are several slices, which SkyPilot does not know.
    """
    text = task(job, args.zone, not args.on_demand)
    if missing := [name for name in job.secrets if name not in os.environ]:
        raise InputError(f"--secret {missing[0]}: not set here; SkyPilot reads it from the environment")
    jobs = query_json(["sky", "jobs", "queue", "--skip-finished", "--output=json"], args.dry_run) or []
    if any(one["job_name"] == job.name and not one["status"].startswith(ENDED) for one in jobs):
        print(f"{job.name}: it is there already, and has not ended; `delete` it to start another")
        return
    secrets = [f"--secret={name}" for name in job.secrets]
    with exported_commit(args.dry_run) as folder:
        if not args.dry_run:
            (folder / "task.yaml").write_text(text)
        launch = ["sky", "jobs", "launch", f"--name={job.name}", *secrets, "--yes", "--detach-run", "../task.yaml"]
        run(launch, args.dry_run, cwd=Path(folder, "tree"))
    if args.dry_run:
        print(text, end="")


def task(job: Job, zone: str | None, spot: bool) -> str:
    """The task as YAML.

    Raises:
        InputError: there are several slices.
    """
    if job.slices > 1:
        raise InputError("--slices: SkyPilot takes one slice; gcloud.py and gke.py take several")
    return TASK.format(
        name=job.name,
        infra=json.dumps(f"gcp/{zone.rpartition('-')[0]}/{zone}" if zone else "gcp"),
        accelerator=f"tpu-{job.tpu_slice.accelerator}",
        system=SYSTEMS[job.tpu_slice.generation],
        spot=json.dumps(spot),
        secrets=json.dumps(dict.fromkeys(job.secrets)),
        extras=" ".join(job.extras),
        command=job.command,
    )


if __name__ == "__main__":
    sys.exit(main(parser(), verbs))
