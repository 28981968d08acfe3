"""A job: a stage of avocado on TPU slices, its command, and the checks that a laptop can make."""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from commands import BUCKET, ROOT
from plans import find_plan

from avocado_jax.config import GrpoConfig, SftConfig, load
from avocado_jax.errors import InputError

TRAINING = {"sft": SftConfig, "grpo": GrpoConfig}
ONE_HOST = ("caption", "evaluate", "prepare")  # stages whose hosts do not communicate
STAGES = (*TRAINING, *ONE_HOST)
# Slices that Google offers under one name: of v5e and v6e it counts chips, of v5p two cores a chip.
TOPOLOGIES = {
    "v5e": ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
SINGLE_HOSTS = ("v5p:2x2x1", "v6e:1x1", "v6e:2x2")  # on TPU VMs and on GKE; a v6e:2x4 is two hosts on GKE
ACCELERATORS = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
SYSTEMS = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}  # of TPU VMs
OBJECT = BUCKET + r"(/[A-Za-z0-9_=.*-]+)+/?"
CONFIG = r"configs/[A-Za-z0-9_]+\.py"
VARIABLE = r"[A-Z][A-Z0-9_]*"
KEYS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


@dataclass(frozen=True)
class Slice:
    """A TPU slice by its generation and shape, as `avocado plan` names it."""

    generation: str
    shape: str

    @property
    def chips(self) -> int:
        """The number of chips; a chip is one device."""
        return prod(map(int, self.shape.split("x")))

    @property
    def accelerator(self) -> str:
        """Google's name for it, as in v5p-128."""
        prefix, cores = ACCELERATORS[self.generation]
        return f"{prefix}-{cores * self.chips}"


@dataclass(frozen=True)
class Job:
    """A stage on slices.

    Attributes:
        words: the command of every host, run in the folder of the code.
        extras: of pyproject.toml, which the hosts install.
        secrets: names of the environment variables with keys.
        restarts: how often a JobSet restarts it at most.
    """

    name: str
    place: Slice
    slices: int
    words: tuple[str, ...]
    extras: tuple[str, ...]
    secrets: tuple[str, ...]
    restarts: int

    @property
    def command(self) -> str:
        """The words, quoted for a shell."""
        return shlex.join(self.words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a job. Unknown arguments are those of the stage."""
    parser.add_argument("stage", choices=STAGES, help="the command of every host")
    parser.add_argument(
        "target", help="sft, grpo: a file of configs/, its fields changed as --a.b value; else as usual"
    )
    parser.add_argument("--workdir", metavar="gs://BUCKET/RUN", help="folder of the run (sft, grpo)")
    parser.add_argument("--topology", required=True, metavar="SLICE", help="as `avocado plan` names it: v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="how many, data parallel (sft, grpo)")
    parser.add_argument("--unplanned", action="store_true", help="start although plans.json has no such plan")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="pass an environment variable to the hosts"
    )
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="an environment variable with a key (README.md)"
    )


def slice_of(topology: str) -> Slice:
    """The slice of a name such as v5p:4x4x4.

    Raises:
        InputError: there is none.
    """
    generation, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(generation, ()):
        known = "; ".join(f"{name}: {', '.join(shapes)}" for name, shapes in TOPOLOGIES.items())
        raise InputError(f"--topology {topology!r}: not one of {known}")
    return Slice(generation, shape)


def job_of(args: argparse.Namespace, fields: list[str], project: str | None = None) -> Job:
    """The job that the arguments describe, checked as far as a laptop can.

    Args:
        args: as declared by `add_arguments`.
        fields: the arguments of the stage.
        project: where the hosts read the secrets from Secret Manager; None: the launcher passes them.

    Raises:
        InputError: stage, slice and bucket do not fit together, or there is no plan of it.
    """
    place = slice_of(args.topology)
    if args.stage in TRAINING:
        extras, words = _training(args, fields, place)
    else:
        extras, words = _one_host(args, fields)
    launch = os.environ.get("AVOCADO_LAUNCH") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    variables = [f"AVOCADO_LAUNCH={launch}", *map(_variable, args.env)]
    for name in args.secret:
        if not re.fullmatch(VARIABLE, name):
            raise InputError(f"--secret {name!r}: not the name of an environment variable")
    if args.secret and project:
        variables.append("AVOCADO_SECRETS=" + ",".join(f"{project}/{name}" for name in args.secret))
    words = ("env", *variables, "bash", "launch/worker.sh", args.stage, args.target, *words)
    if any("\n" in word for word in words):
        raise InputError("a line break in an argument or variable: manifests take one line")
    restarts = 1000 if args.stage in TRAINING else 50  # worker.sh bounds those of training by progress
    return Job(args.name, place, args.slices, words, ("tpu", *extras), tuple(args.secret), restarts)


def _training(args: argparse.Namespace, fields: list[str], place: Slice) -> tuple[list[str], list[str]]:
    """Extras and arguments of sft and grpo."""
    if args.workdir is None:
        raise InputError(f"{args.stage}: --workdir gs://BUCKET/RUN is required")
    if not re.fullmatch(CONFIG, args.target):
        raise InputError(f"config {args.target!r}: not a file of configs/, which is copied to the hosts")
    if any(field.split("=")[0] == "--mesh.slices" for field in fields):
        raise InputError("--mesh.slices: follows from --slices")
    fields = [*fields, *(["--mesh.slices", str(args.slices)] if args.slices > 1 else [])]
    config = load(str(ROOT / args.target), fields)
    kind = TRAINING[args.stage]
    if type(config) is not kind:
        raise InputError(f"{args.target}: a {type(config).__name__}; {args.stage} takes a {kind.__name__}")
    _check_reachable("init", config.init)
    _check_reachable("data.train", config.data.train)
    if config.data.heldout:
        _check_reachable("data.heldout", config.data.heldout)
    chips = place.chips * args.slices
    _check_mesh(config, chips)
    if not args.unplanned:
        print(f"planned: {find_plan(args.target, args.topology, fields)}", file=sys.stderr)
    speaks = any(source.startswith("world:") for source in (config.data.train, config.data.heldout or ""))
    extras = [*(["wandb"] if config.wandb else []), *(["world"] if speaks else [])]
    words = ["--workdir", args.workdir.rstrip("/"), "--coordinator", "auto", "--devices", str(chips), *fields]
    return extras, words


def _one_host(args: argparse.Namespace, fields: list[str]) -> tuple[list[str], list[str]]:
    """Extras and arguments of the stages that run on one host. They read and write a bucket."""
    if args.workdir is not None:
        raise InputError(f"--workdir: of sft and grpo, not of {args.stage}")
    if args.topology not in SINGLE_HOSTS or args.slices > 1:
        one = f"one of {', '.join(SINGLE_HOSTS)}"
        raise InputError(f"{args.stage}: takes one host ({one}); for more, start several jobs with --shard I/N")
    if args.stage == "prepare":
        name, given = "OUT", fields[0] if fields else ""
    else:
        name, given = "--out", _option(fields, "--out")
    if not re.fullmatch(OBJECT, given):
        raise InputError(f"{args.stage}: {name} {given!r}: the host's disk is temporary; write to gs://BUCKET/FOLDER")
    return [], fields


def _option(fields: Sequence[str], name: str) -> str:
    for field, following in zip(fields, [*fields[1:], ""]):
        if field == name:
            return following
        if field.startswith(f"{name}="):
            return field.partition("=")[2]
    return ""


def _variable(name: str) -> str:
    """NAME=VALUE of a variable of this environment.

    Raises:
        InputError: it is not set, or its name is that of a key, which no command line may contain.
    """
    if KEYS.search(name):
        raise InputError(f"--env {name}: looks like a key; pass it as --secret {name}")
    if not re.fullmatch(VARIABLE, name) or name not in os.environ:
        raise InputError(f"--env {name}: not an environment variable that is set here")
    return f"{name}={os.environ[name]}"


def _check_reachable(name: str, value: str) -> None:
    """Hosts share no disk: their input is in a bucket, comes with the code, or is generated."""
    inner = value.removeprefix("tfds:")
    inside = value.startswith(("world:", "avocado_jax/assets/"))
    if not inside and not re.fullmatch(BUCKET + r"(/[A-Za-z0-9_=.-]+)+/?(:[a-z]+)?", inner):
        raise InputError(f"--{name} {value!r}: hosts share no disk; give gs://BUCKET/FOLDER")


def _check_mesh(config: Any, chips: int) -> None:
    """Check that the mesh uses all chips and divides the batch, as `make_mesh` and `set_up` do on the hosts."""
    mesh = config.mesh
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    known = prod(size for size in sizes if size > 0) * mesh.slices
    if -1 in sizes and chips % known == 0:
        sizes[sizes.index(-1)] = chips // known
    if prod(sizes) * mesh.slices != chips:
        raise InputError(f"mesh: data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} is not {chips} chips")
    rows, parts = config.batch * getattr(config, "split", 1), sizes[0] * sizes[1] * mesh.slices * config.accumulate
    if rows % parts:
        raise InputError(f"batch: {rows} rows are not divided by data x fsdp x accumulate = {parts}")
