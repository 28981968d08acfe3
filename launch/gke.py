"""Training on TPU slices of a GKE cluster, as a JobSet that xpk makes (pip install xpk==1.16.0, in a place of its own).

  python launch/gke.py cluster --cluster C --project P --zone Z --topology v5p:4x4x4
  python launch/gke.py image --image REGISTRY/avocado:TAG
  python launch/gke.py start --cluster C --project P --zone Z --name NAME --image REGISTRY/avocado:TAG \\
    sft configs/sft_7b.py --topology v5p:4x4x4 --workdir gs://BUCKET/RUN --init gs://BUCKET/base \\
    --data.train gs://BUCKET/shards --accumulate 2

The JobSet starts all hosts again on every status but 0, 2 and 3, and from its newest checkpoint the run goes on.
With --dry-run every command and the whole manifest are printed, and nothing is run.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from job import RESTARTS, act, add_arguments, job_of, main, slice_of

from avocado_jax.errors import InputError

GRACE_SECONDS = 120  # of a pod after SIGTERM: the training loop takes at most 90 to save
VERBS = {
    "cluster": "make a cluster with node pools of the slices, JobSet and Kueue",
    "image": "build the image of this commit, and push it",
    "start": "start the job",
    "logs": "follow what its hosts say",
    "status": "of the jobs of the cluster",
    "delete": "end the job",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb, meaning in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, allow_abbrev=False)
        one.add_argument("--dry-run", action="store_true", help="print commands and manifest, run nothing")
        if verb in ("image", "start"):
            one.add_argument("--image", required=True, metavar="REGISTRY/NAME:TAG")
        if verb in ("start", "logs", "delete"):
            one.add_argument("--name", required=True, help="of the job")
        if verb not in ("image", "logs"):
            one.add_argument("--cluster", required=True)
            one.add_argument("--project", required=True)
            one.add_argument("--zone", required=True)
        if verb == "cluster":
            one.add_argument("--topology", required=True, metavar="SLICE", help="as `avocado plan` names it")
            one.add_argument("--slices", type=int, default=1, metavar="N")
            one.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
        if verb == "start":
            add_arguments(one)
    return made


def run(args: argparse.Namespace, fields: list[str]) -> None:
    """Do what `args.verb` says."""
    if args.verb == "image":
        build = ["docker", "build", "--file=launch/Containerfile", f"--tag={args.image}", "."]
        act([build, ["docker", "push", args.image]], args.dry_run)
        return
    if args.verb == "logs":
        chosen = f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}"
        follow = ["--follow", "--prefix", "--max-log-requests=1000", "--container=jax-tpu"]
        act([["kubectl", "logs", chosen, *follow]], args.dry_run)
        return
    where = [f"--cluster={args.cluster}", f"--project={args.project}", f"--zone={args.zone}"]
    if args.verb == "cluster":
        place = slice_of(args.topology)
        kind = [
            f"--tpu-type={place.accelerator}",
            f"--num-slices={args.slices}",
            "--spot" if args.spot else "--on-demand",
        ]
        act([["xpk", "cluster", "create", *where, *kind]], args.dry_run)
    elif args.verb == "status":
        act([["xpk", "workload", "list", *where]], args.dry_run)
    elif args.verb == "delete":
        act([["xpk", "workload", "delete", f"--workload={args.name}", *where]], args.dry_run)
    else:
        job = job_of(args, fields)
        command = ["xpk", "workload", "create", f"--workload={args.name}", *where]
        command += [f"--tpu-type={job.place.accelerator}", f"--num-slices={job.slices}", f"--docker-image={args.image}"]
        # xpk starts again on 42 and 127 to 255 by itself.
        command += [f"--max-restarts={RESTARTS}", "--restart-on-exit-codes=1,4-126"]
        command += [f"--termination-grace-period-seconds={GRACE_SECONDS}"]
        # xpk's shell passes SIGTERM on to its child only: `exec` makes that the worker.
        command += [f"--command=exec {job.command}"]
        act([command], args.dry_run)
        if args.dry_run:
            print(manifest(command), end="")


def manifest(command: list[str]) -> str:
    """The JobSet that xpk would apply, made by xpk without a cluster.

    Raises:
        InputError: xpk is not installed, or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "jobset.yaml")
        dry = [*command, "--dry-run", "--skip-validation", f"--output-manifest-file={path}"]
        try:
            done = subprocess.run(dry, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise InputError("xpk is not installed, which makes the manifest: pip install xpk==1.16.0") from None
        if done.returncode or not path.is_file():
            raise InputError(f"xpk: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return path.read_text()


if __name__ == "__main__":
    sys.exit(main(parser(), run))
