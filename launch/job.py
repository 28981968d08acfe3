"""What the launchers share: a job and its checks, the plan it must fit, and commands that are run or only printed."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a laptop needs no more of the package than its configs

from avocado_jax.config import GrpoConfig, SftConfig, flat, load  # noqa: E402
from avocado_jax.errors import InputError  # noqa: E402

STAGES = {"sft": SftConfig, "grpo": GrpoConfig}
RESTARTS = 1000  # of a JobSet; a job without progress ends after 50 starts (train/supervisor.py)
# Slices that Google lends under one name: of v5e and v6e it counts chips, of v5p two cores a chip.
TOPOLOGIES = {
    "v5e": ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
ACCELERATORS = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
SYSTEMS = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}  # of TPU VMs

BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
SHAPES = {
    "name": (r"[a-z]([a-z0-9-]{0,36}[a-z0-9])?", "lower-case letters, digits and dashes, at most 38"),
    "project": (r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone, as in us-east5-a"),
    "cluster": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "the name of a GKE cluster"),
    "image": (r"[a-z0-9][a-z0-9._/-]*[a-z0-9]:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", "REGISTRY/NAME:TAG"),
    "service_account": (r"[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com", "NAME@PROJECT.iam.gserviceaccount.com"),
    "workdir": (BUCKET + r"(/[A-Za-z0-9_=.-]+)+/?", "gs://BUCKET/RUN of letters, digits and ._=-"),
    "config": (r"configs/[A-Za-z0-9_]+\.py", "a file of configs/, which travels with the code"),
}
# Fields that decide what a step takes of a chip: a plan holds where they are the same.
PLANNED = re.compile(
    r"batch|accumulate|train|(param_|frozen_|reference_)?dtype|remat|attention|group|split|passes|minibatches"
    r"|(mesh|lora|nominal)\..*|data\.(references|caption_tokens)|sampling\.tokens|objective\.beta"
)


@dataclass(frozen=True)
class Slice:
    """A TPU slice by its generation and shape, as `avocado plan` names it."""

    generation: str
    shape: str

    @property
    def chips(self) -> int:
        """How many chips it has; a chip is one device."""
        return prod(map(int, self.shape.split("x")))

    @property
    def accelerator(self) -> str:
        """Google's name for it, as in v5p-128."""
        prefix, cores = ACCELERATORS[self.generation]
        return f"{prefix}-{cores * self.chips}"


@dataclass(frozen=True)
class Job:
    """A stage of training on slices."""

    name: str
    place: Slice
    slices: int
    words: tuple[str, ...]  # what every host runs

    @property
    def command(self) -> str:
        """What every host runs, for a shell."""
        return shlex.join(self.words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what says which job it is; what is not known are fields of the config."""
    parser.add_argument("stage", choices=STAGES, help="the command to run on every host")
    parser.add_argument("config", help="a file of configs/; its fields are changed as --a.b value")
    parser.add_argument("--workdir", required=True, metavar="gs://BUCKET/RUN", help="folder of the run")
    parser.add_argument("--topology", required=True, metavar="SLICE", help="as `avocado plan` names it: v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, data parallel")
    parser.add_argument("--unplanned", action="store_true", help="start although README.md's table has no such plan")


def well_formed(args: argparse.Namespace) -> None:
    """See that every name is one: nothing else ever reaches a command.

    Raises:
        InputError: one is not.
    """
    for key, (shape, meaning) in SHAPES.items():
        value = getattr(args, key, None)
        if value is not None and not re.fullmatch(shape, value):
            raise InputError(f"--{key.replace('_', '-')} {value!r}: not {meaning}")
    if getattr(args, "slices", 1) < 1:
        raise InputError(f"--slices {args.slices}: at least 1")


def slice_of(topology: str) -> Slice:
    """The slice that is so named.

    Raises:
        InputError: there is none.
    """
    generation, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(generation, ()):
        known = "; ".join(f"{name}: {', '.join(shapes)}" for name, shapes in TOPOLOGIES.items())
        raise InputError(f"--topology {topology!r}: not one of {known}")
    return Slice(generation, shape)


def job_of(args: argparse.Namespace, fields: list[str]) -> Job:
    """The job that the arguments describe, checked as far as a laptop can.

    Raises:
        InputError: config, slice and bucket do not fit together, or no plan says that they do.
    """
    place = slice_of(args.topology)
    if any(field.split("=")[0] == "--mesh.slices" for field in fields):
        raise InputError("--mesh.slices: follows from --slices")
    fields = [*fields, *(["--mesh.slices", str(args.slices)] if args.slices > 1 else [])]
    config = load(str(ROOT / args.config), fields)
    kind = STAGES[args.stage]
    if type(config) is not kind:
        raise InputError(f"{args.config}: a {type(config).__name__}; {args.stage} takes a {kind.__name__}")
    _reachable("init", config.init)
    _reachable("data.train", config.data.train)
    if config.data.heldout:
        _reachable("data.heldout", config.data.heldout)
    chips = place.chips * args.slices
    _divides(config, chips)
    if not args.unplanned:
        print(f"planned: {planned(args.config, args.topology, config, fields)}", file=sys.stderr)
    launch = os.environ.get("AVOCADO_LAUNCH") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    words = ["env", f"AVOCADO_LAUNCH={launch}", "bash", "launch/worker.sh"]
    words += [args.stage, args.config, "--workdir", args.workdir.rstrip("/")]
    return Job(args.name, place, args.slices, (*words, "--coordinator", "auto", "--devices", str(chips), *fields))


def _reachable(name: str, value: str) -> None:
    """Hosts share no disk: what they read lies in a bucket, comes with the code, or is made as it is needed."""
    inner = value.removeprefix("tfds:")
    inside = value.startswith(("world:", "avocado_jax/assets/"))
    if not inside and not re.fullmatch(BUCKET + r"(/[A-Za-z0-9_=.-]+)+/?(:[a-z]+)?", inner):
        raise InputError(f"--{name} {value!r}: hosts share no disk; give gs://BUCKET/FOLDER")


def _divides(config: Any, chips: int) -> None:
    """See that the mesh uses up the chips and divides the batch, as `make_mesh` and `set_up` will ask."""
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


def plans() -> Iterable[tuple[list[str], dict[str, str]]]:
    """The plans of README.md's tables: the arguments of `avocado plan`, and the line by the table's heads."""
    heads: list[str] = []
    for line in (ROOT / "launch" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] == "command":
            heads = cells
        elif cells and (found := re.match(r"`avocado plan (.*)`$", cells[0])):
            yield shlex.split(found[1]), dict(zip(heads[1:], cells[1:]))


def planned(path: str, topology: str, config: Any, fields: list[str]) -> str:
    """What README.md's table says that a step of this config takes of a slice.

    Raises:
        InputError: it does not fit, or there is no plan of it.
    """
    for (held, *rest), told in plans():
        if held != path or "--topology" not in rest:
            continue
        at = rest.index("--topology")
        if rest[at + 1] != topology or _taking(load(str(ROOT / held), rest[:at] + rest[at + 2 :])) != _taking(config):
            continue
        said = ", ".join(f"{head} {cell}" for head, cell in told.items() if cell != "-")
        if not told["fits"].startswith("yes"):
            raise InputError(f"{path} does not fit {topology}: {said}")
        return said
    mine = [word for name, value in _changed(fields) if PLANNED.fullmatch(name) for word in (f"--{name}", value)]
    command = shlex.join(["avocado", "plan", path, "--topology", topology, *mine])
    raise InputError(f"launch/README.md has no plan of this: run `{command}` and add its line, or pass --unplanned")


def _taking(config: Any) -> dict[str, Any]:
    return {name: value for name, value, _ in flat(config) if PLANNED.fullmatch(name)}


def _changed(fields: list[str]) -> list[tuple[str, str]]:
    """Fields as `load` takes them, by name and value."""
    words = [part for field in fields for part in (field.split("=", 1) if field.startswith("--") else [field])]
    return [(name.removeprefix("--"), value) for name, value in zip(words[::2], words[1::2])]


def act(commands: Iterable[list[str]], dry: bool) -> None:
    """Run commands one after the other, or only print them."""
    for command in commands:
        print(shlex.join(command), flush=True)
        if not dry:
            try:
                subprocess.run(command, check=True, cwd=ROOT)
            except FileNotFoundError:
                raise InputError(f"{command[0]}: not installed") from None


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, list[str]], None]) -> int:
    """Parse, check and run. Returns the exit status: 0, 1 a command failed, 2 bad input."""
    args, fields = parser.parse_known_args()
    try:
        if fields and not hasattr(args, "stage"):
            raise InputError(f"unrecognized: {shlex.join(fields)}")
        well_formed(args)
        run(args, fields)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{parser.prog}: {error.cmd[0]} ended with status {error.returncode}", file=sys.stderr)
        return 1
    return 0
