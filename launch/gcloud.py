"""Training on TPU VMs of Google Cloud, by gcloud's queued resources.

  python launch/gcloud.py start --name NAME --project P --zone Z sft configs/sft_7b.py --topology v5p:4x4x4 \\
    --workdir gs://BUCKET/RUN --init gs://BUCKET/base --data.train gs://BUCKET/shards --accumulate 2
  python launch/gcloud.py logs --name NAME --project P --zone Z

`start` asks for the slice, waits for it, copies the commit that is checked out here, sets up every host and starts
the job on all of them, where systemd starts it again on every status but 0, 2 and 3. `resume` takes the arguments of
`start`: it gives back what was preempted and starts anew, on another slice if another is named; the run goes on from
its newest checkpoint. `stop` ends the step and saves. With --dry-run every command is printed and none is run.
"""

import argparse
import shlex
import subprocess
import sys
import time

from job import ROOT, SYSTEMS, Job, act, add_arguments, job_of, main

from avocado_jax.errors import InputError

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
POLL_SECONDS = 30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gcloud.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb, meaning in VERBS.items():
        one = verbs.add_parser(verb, help=meaning, allow_abbrev=False)
        one.add_argument("--name", required=True, help="of the queued resource and its nodes")
        one.add_argument("--project", required=True)
        one.add_argument("--zone", required=True)
        one.add_argument("--dry-run", action="store_true", help="print the commands, run none")
        if verb in ("start", "resume"):
            one.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
            one.add_argument("--service-account", metavar="EMAIL", help="whom the hosts act as")
            add_arguments(one)
        else:
            one.add_argument("--slices", type=int, default=1, metavar="N", help="as the job was started with")
        if verb == "logs":
            one.add_argument("--host", type=int, default=0, metavar="I", help="of the first slice")
    return made


VERBS = {
    "start": "ask for the slices, wait for them, set them up, start the job",
    "resume": "give back what was preempted, and start anew",
    "logs": "follow what a host says",
    "status": "of the queued resource, and of the job on every host",
    "stop": "end the step, save, and leave the slices idle",
    "delete": "give the slices back",
}


def run(args: argparse.Namespace, fields: list[str]) -> None:
    """Do what `args.verb` says."""
    where = [f"--project={args.project}", f"--zone={args.zone}"]
    nodes = [args.name] if args.slices == 1 else [f"{args.name}-{number}" for number in range(args.slices)]
    give_back = [*QUEUED, "delete", args.name, *where, "--force", "--quiet"]
    if args.verb in ("start", "resume"):
        job = job_of(args, fields)
        if args.verb == "resume":
            act([give_back], args.dry_run)
        start(args, job, where, nodes)
    elif args.verb == "logs":
        said = "sudo journalctl --unit avocado --output cat --lines 50 --follow"
        act([on_host(nodes[0], where, str(args.host), said)], args.dry_run)
    elif args.verb == "status":
        state = [*QUEUED, "describe", args.name, *where, "--format=value(state.state)"]
        act(
            [state, *(on_host(node, where, "all", "systemctl is-active avocado || true") for node in nodes)],
            args.dry_run,
        )
    elif args.verb == "stop":
        act([on_host(node, where, "all", "sudo systemctl stop avocado") for node in nodes], args.dry_run)
    else:
        act([give_back], args.dry_run)


def start(args: argparse.Namespace, job: Job, where: list[str], nodes: list[str]) -> None:
    """From nothing to a job that runs on every host."""
    archive = f"/tmp/{args.name}.tar.gz"
    if not args.dry_run and subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode:
        raise InputError("there are changes that are not committed: what is sent to the hosts is the commit")
    shape = [f"--node-id={args.name}"]
    if job.slices > 1:
        shape = [f"--node-count={job.slices}", f"--node-prefix={args.name}"]
    shape += [f"--accelerator-type={job.place.accelerator}", f"--runtime-version={SYSTEMS[job.place.generation]}"]
    shape += ["--spot"] if args.spot else []
    shape += [f"--service-account={args.service_account}"] if args.service_account else []
    act([[*QUEUED, "create", args.name, *where, *shape]], args.dry_run)
    wait(args, where)
    act([["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]], args.dry_run)
    unpack = "rm -rf avocado_jax && mkdir avocado_jax && tar -xzf avocado.tar.gz -C avocado_jax"
    for node in nodes:
        copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{node}:avocado.tar.gz", "--worker=all", *where]
        act([copy, on_host(node, where, "all", f"{unpack} && bash avocado_jax/launch/setup.sh")], args.dry_run)
    service = shlex.join([*job.words[:3], "avocado_jax/launch/service.sh", *job.words[4:]])
    act([on_host(node, where, "all", service) for node in nodes], args.dry_run)


def wait(args: argparse.Namespace, where: list[str]) -> None:
    """Until the slices are there.

    Raises:
        InputError: they will not come.
    """
    command = [*QUEUED, "describe", args.name, *where, "--format=value(state.state)"]
    if args.dry_run:
        print(f"until {shlex.join(command)} | grep -x ACTIVE; do sleep {POLL_SECONDS}; done")
        return
    before = None
    while True:
        state = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if state != before:
            print(f"{args.name}: {state}", file=sys.stderr, flush=True)
        if state == "ACTIVE":
            return
        if state in ("FAILED", "SUSPENDING", "SUSPENDED"):
            raise InputError(f"{args.name} is {state}: `resume` gives it back and asks again")
        before = state
        time.sleep(POLL_SECONDS)


def on_host(node: str, where: list[str], worker: str, command: str) -> list[str]:
    """A command for a host of a node ("all": for each of them)."""
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *where, f"--worker={worker}", f"--command={command}"]


if __name__ == "__main__":
    sys.exit(main(parser(), run))
