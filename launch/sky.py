"""Training on a TPU slice that SkyPilot finds, and finds again when it is preempted (pip install 'skypilot[gcp]').

  python launch/sky.py start --name NAME --zone Z sft configs/sft_7b.py --topology v5p:4x4x4 \\
    --workdir gs://BUCKET/RUN --init gs://BUCKET/base --data.train gs://BUCKET/shards --accumulate 2

A managed job on spot slices: it is started again after a preemption and on every status but 0, 2 and 3, and from its
newest checkpoint the run goes on. With --dry-run the command and the whole task are printed, and nothing is run.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from job import SYSTEMS, Job, act, add_arguments, job_of, main

from avocado_jax.errors import InputError

AGAIN = [1, *range(4, 256)]  # without bound in SkyPilot: train/supervisor.py counts the starts
VERBS = {
    "start": "start the job",
    "logs": "follow what its hosts say",
    "status": "of all managed jobs",
    "delete": "end the job and give the slice back",
}
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
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: 0
    recover_on_exit_codes: {again}
setup: bash launch/setup.sh
run: {command}
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="sky.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb, meaning in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, allow_abbrev=False)
        one.add_argument("--dry-run", action="store_true", help="print command and task, run nothing")
        if verb != "status":
            one.add_argument("--name", required=True, help="of the job")
        if verb == "start":
            one.add_argument("--zone", help="default: wherever there are such slices")
            one.add_argument("--on-demand", action="store_true", help="dearer, and not preempted")
            add_arguments(one)
    return made


def run(args: argparse.Namespace, fields: list[str]) -> None:
    """Do what `args.verb` says."""
    if args.verb == "logs":
        act([["sky", "jobs", "logs", "--name", args.name]], args.dry_run)
    elif args.verb == "status":
        act([["sky", "jobs", "queue"]], args.dry_run)
    elif args.verb == "delete":
        act([["sky", "jobs", "cancel", "--name", args.name, "--yes"]], args.dry_run)
    else:
        text = task(job_of(args, fields), args.zone, not args.on_demand)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{args.name}.yaml")
            path.write_text(text)
            act([["sky", "jobs", "launch", f"--name={args.name}", "--yes", "--detach-run", str(path)]], args.dry_run)
        if args.dry_run:
            print(text, end="")


def task(job: Job, zone: str | None, spot: bool) -> str:
    """The task, as YAML; a JSON string is one of YAML's too.

    Raises:
        InputError: SkyPilot knows slices one by one.
    """
    if job.slices > 1:
        raise InputError("--slices: SkyPilot takes one slice; gcloud.py and gke.py take several")
    return TASK.format(
        name=job.name,
        infra=json.dumps(f"gcp/{zone.rpartition('-')[0]}/{zone}" if zone else "gcp"),
        accelerator=f"tpu-{job.place.accelerator}",
        system=SYSTEMS[job.place.generation],
        spot=json.dumps(spot),
        again=json.dumps(AGAIN),
        command=json.dumps(job.command),
    )


if __name__ == "__main__":
    sys.exit(main(parser(), run))
