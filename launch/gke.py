"""Jobs on TPU slices of a GKE cluster: a JobSet, whose manifest xpk renders (pip install xpk==1.16.0, in its own venv).

  python launch/gke.py cluster --cluster C --project P --zone Z --topology v5p:4x4x4 --service-account EMAIL
  python launch/gke.py image --image REGISTRY/avocado:TAG
  python launch/gke.py start --cluster C --project P --zone Z --name NAME --image REGISTRY/avocado:TAG \\
    --topology v5p:4x4x4 sft configs/sft_7b.py --workdir gs://BUCKET/RUN --init gs://BUCKET/base \\
    --data.train gs://BUCKET/shards --accumulate 2

The JobSet restarts all hosts on every status but 0, 2 and 3, and the run resumes from its newest checkpoint. `start`
creates the JobSet unless it is there; one that has ended, for whatever reason, is replaced. Run it again after any
failure. With --dry-run all commands and the manifest are printed and nothing is run.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import exported_commit, main, query, query_json, run
from job import Job, add_arguments, job_of, slice_of

from avocado_jax.errors import InputError

GENERATIONS = {"v5e": "v5-lite", "v5p": "v5p", "v6e": "v6e"}  # in GKE's names of accelerators
GRACE_SECONDS = 120  # of a pod after SIGTERM: the training loop takes at most 90 to save
VERBS = {
    "cluster": "create a cluster with node pools of the slices, JobSet and Kueue",
    "image": "build and push the image of the commit that is checked out",
    "start": "start the job",
    "logs": "follow the logs of all hosts",
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
        if verb != "image":
            one.add_argument("--cluster", required=True)
            one.add_argument("--project", required=True)
            one.add_argument("--zone", required=True)
        if verb == "image":
            one.add_argument(
                "--extra", action="append", default=[], choices=("wandb", "world"), help="of pyproject.toml"
            )
        if verb == "cluster":
            one.add_argument("--topology", required=True, metavar="SLICE", help="as `avocado plan` names it")
            one.add_argument("--slices", type=int, default=1, metavar="N")
            one.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
            one.add_argument("--service-account", metavar="EMAIL", help="the identity of the nodes, and so of the pods")
        if verb == "start":
            add_arguments(one)
    return made


def verbs(args: argparse.Namespace) -> None:
    """Run a verb."""
    if args.verb == "image":
        extras = ",".join(["tpu", *args.extra])
        build = ["docker", "build", "--platform=linux/amd64", "--file=launch/Containerfile", f"--tag={args.image}"]
        with exported_commit(args.dry_run) as folder:
            run([*build, f"--build-arg=EXTRAS={extras}", "."], args.dry_run, cwd=folder / "tree")
        run(["docker", "push", args.image], args.dry_run)
    elif args.verb == "cluster":
        tpu_slice = slice_of(args.topology)
        kind = [f"--tpu-type={tpu_slice.accelerator}", f"--num-slices={args.slices}"]
        kind.append("--spot" if args.spot else "--on-demand")
        if args.service_account:
            kind.append(f"--custom-nodepool-arguments=--service-account={args.service_account}")
        run(["xpk", "cluster", "create", *_where(args), *kind], args.dry_run)
    elif args.verb == "start":
        start(args, job_of(args, args.project))
    elif args.verb == "logs":
        chosen = f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}"
        follow = ["--follow", "--prefix", "--max-log-requests=1000", "--container=jax-tpu"]
        run([*kubectl(args), "logs", chosen, *follow], args.dry_run)
    elif args.verb == "status":
        run([*kubectl(args), "get", "jobsets,pods", "--output=wide"], args.dry_run)
    else:
        run([*kubectl(args), "delete", "jobset", args.name, "--ignore-not-found"], args.dry_run)


def start(args: argparse.Namespace, job: Job) -> None:
    """Create the JobSet, unless the same one is there and has not ended.

    Raises:
        InputError: another job of this name runs, or xpk renders no manifest.
    """
    if extras := [f"--extra {name}" for name in job.extras if name != "tpu"]:
        print(f"gke.py: the image needs {' '.join(extras)}", file=sys.stderr)
    text = manifest(args, job)
    control = kubectl(args)
    there = query_json([*control, "get", "jobset", args.name, "--ignore-not-found", "--output=json"], args.dry_run)
    if there and not ended(there):
        if differs := differences(there, args.image, job):
            raise InputError(f"{args.name}: runs with another {differs}; `delete` it first, and the run resumes")
        print(f"{args.name}: it is there already, and has not ended")
        return
    if there:
        run([*control, "delete", "jobset", args.name, "--ignore-not-found", "--wait"], args.dry_run)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "jobset.yaml").write_text(text)
        run([*control, "create", "--filename=jobset.yaml"], args.dry_run, cwd=folder)
    if args.dry_run:
        print(text, end="")


def ended(jobset: dict[str, Any]) -> bool:
    """Whether a JobSet has completed, failed for good or is being deleted."""
    conditions = jobset.get("status", {}).get("conditions", [])
    final = any(one["type"] in ("Completed", "Failed") and one["status"] == "True" for one in conditions)
    return final or "deletionTimestamp" in jobset["metadata"]


def differences(jobset: dict[str, Any], image: str, job: Job) -> str:
    """Name what a JobSet has in another way than a job; empty: nothing."""
    (slices,) = jobset["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    selector, command = pod["nodeSelector"], container["command"][-1]
    same = {
        "number of slices": slices["replicas"] == job.slices,
        "topology": selector["cloud.google.com/gke-tpu-topology"] == job.tpu_slice.shape
        and GENERATIONS[job.tpu_slice.generation] in selector["cloud.google.com/gke-tpu-accelerator"],
        "image": container["image"] == image,
        "command": f"({_without_launch(f'exec {job.command}')})" in _without_launch(command),
    }
    return ", ".join(name for name, equal in same.items() if not equal)


def _without_launch(command: str) -> str:
    return re.sub(r"AVOCADO_LAUNCH=\S+ ", "", command)


def manifest(args: argparse.Namespace, job: Job) -> str:
    """The JobSet, rendered by xpk without a cluster.

    Raises:
        InputError: xpk is not installed, or fails.
    """
    command = ["xpk", "workload", "create", f"--workload={args.name}", *_where(args)]
    command += [f"--tpu-type={job.tpu_slice.accelerator}", f"--num-slices={job.slices}", f"--docker-image={args.image}"]
    # xpk itself restarts on 42 and 127 to 255.
    command += [f"--max-restarts={job.restarts}", "--restart-on-exit-codes=1,4-126"]
    command += [f"--termination-grace-period-seconds={GRACE_SECONDS}"]
    # xpk's shell passes SIGTERM on to its child only: `exec` makes the child worker.sh.
    command += [f"--command=exec {job.command}", "--dry-run", "--skip-validation"]
    print(shlex.join(command), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "jobset.yaml")
        try:
            done = subprocess.run(
                [*command, f"--output-manifest-file={path}"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise InputError("xpk is not installed, which renders the manifest: pip install xpk==1.16.0") from None
        if done.returncode or not path.is_file():
            raise InputError(f"xpk: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return path.read_text()


def kubectl(args: argparse.Namespace) -> list[str]:
    """kubectl for the cluster, whose credentials are fetched first. The current context is not used.

    Raises:
        InputError: there is no such cluster.
    """
    region = args.zone.rpartition("-")[0]
    project = f"--project={args.project}"
    clusters = ["gcloud", "container", "clusters"]
    found = query(
        [*clusters, "list", project, f"--filter=name={args.cluster}", "--format=value(location)"], args.dry_run
    )
    places = [region] if found is None else [location for location in found.split() if location in (region, args.zone)]
    if not places:
        raise InputError(f"--cluster {args.cluster}: there is none in {region}")
    run([*clusters, "get-credentials", args.cluster, f"--location={places[0]}", project], args.dry_run)
    return ["kubectl", f"--context=gke_{args.project}_{places[0]}_{args.cluster}", "--namespace=default"]


def _where(args: argparse.Namespace) -> list[str]:
    return [f"--cluster={args.cluster}", f"--project={args.project}", f"--zone={args.zone}"]


if __name__ == "__main__":
    sys.exit(main(parser(), verbs))
