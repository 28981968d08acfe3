"""A job: a stage of avocado on TPU slices, its command, and the checks that a laptop can make."""

import argparse
import importlib
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from commands import BUCKET, ROOT, check_name
from plans import find_plan

from avocado_jax.config import GrpoConfig, SftConfig, load
from avocado_jax.errors import InputError

TRAINING = {"sft": SftConfig, "grpo": GrpoConfig}
FLAGS = ("--deterministic", "--debug-nans")  # of the stages of training
# Stages of one host, and their arguments that name what the host reads.
ONE_HOST = {
    "caption": ("inputs", "manifest", "prompt_file", "checkpoint"),
    "prepare": ("source", "media", "tokenizer", "prompt_file"),
    "evaluate": ("data", "videos", "captions", "checkpoint", "judge_model", "prompts", "prompt_file"),
}
MODELS = ("checkpoint", "tokenizer", "judge_model")  # arguments that may name a model on the Hugging Face hub
DATA_SETS = ("source", "media")  # and a data set
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
HUB = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\S+)?"
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
    tpu_slice: Slice
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
    """Declare the arguments of a job. All that follows the stage belongs to the stage."""
    parser.add_argument("--topology", metavar="SLICE", help="required; as `avocado plan` names it: v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="how many, data parallel (sft, grpo)")
    parser.add_argument("--unplanned", action="store_true", help="start although plans.json has no such plan")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="pass an environment variable to the hosts"
    )
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="an environment variable with a key (README.md)"
    )
    parser.add_argument("stage", choices=(*TRAINING, *ONE_HOST), help="the command of every host")
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...", help="its arguments, as after `avocado STAGE`"
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


def job_of(args: argparse.Namespace, project: str | None = None) -> Job:
    """The job that the arguments describe, checked as far as a laptop can.

    Args:
        args: as declared by `add_arguments`.
        project: where the hosts read the secrets from Secret Manager; None: the launcher passes them.

    Raises:
        InputError: stage, slice and bucket do not fit together, or there is no plan of it.
    """
    if args.topology is None:
        raise InputError(f"--topology SLICE is required, before {args.stage}: what follows it are its own arguments")
    tpu_slice = slice_of(args.topology)
    extras, words = _training(args, tpu_slice) if args.stage in TRAINING else ([], _one_host(args))
    launch = os.environ.get("AVOCADO_LAUNCH") or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    variables = [f"AVOCADO_LAUNCH={launch}", *map(_variable, args.env)]
    for name in args.secret:
        if not re.fullmatch(VARIABLE, name):
            raise InputError(f"--secret {name!r}: not the name of an environment variable")
    if args.secret and project:
        variables.append("AVOCADO_SECRETS=" + ",".join(f"{project}/{name}" for name in args.secret))
    words = ("env", *variables, "bash", "launch/worker.sh", args.stage, *words)
    if any("\n" in word for word in words):
        raise InputError("a line break in an argument or variable: manifests take one line")
    restarts = 1000 if args.stage in TRAINING else 50  # worker.sh bounds those of training by progress
    return Job(args.name, tpu_slice, args.slices, words, ("tpu", *extras), tuple(args.secret), restarts)


def _training(args: argparse.Namespace, tpu_slice: Slice) -> tuple[list[str], list[str]]:
    """Extras and arguments of sft and grpo: the config first, then --workdir and fields of the config."""
    target, *rest = args.words or [""]
    if not re.fullmatch(CONFIG, target):
        raise InputError(f"config {target!r}: not a file of configs/, which is copied to the hosts")
    parser = _StageParser(args.stage)
    parser.add_argument("--workdir")
    for flag in FLAGS:
        parser.add_argument(flag, action="append_const", const=flag, dest="flags", default=[])
    given, fields = parser.parse_known_args(rest)
    if given.workdir is None:
        raise InputError(f"{args.stage}: --workdir gs://BUCKET/RUN is required")
    check_name("workdir", given.workdir)
    if any(field.split("=")[0] == "--mesh.slices" for field in fields):
        raise InputError("--mesh.slices: follows from --slices")
    fields = [*fields, *(["--mesh.slices", str(args.slices)] if args.slices > 1 else [])]
    config = load(str(ROOT / target), fields)
    kind = TRAINING[args.stage]
    if type(config) is not kind:
        raise InputError(f"{target}: a {type(config).__name__}; {args.stage} takes a {kind.__name__}")
    if re.fullmatch(HUB, config.init) and not (ROOT / config.init).exists():
        convert = f"run `avocado convert from-hf {config.init} gs://BUCKET/FOLDER` first"
        raise InputError(f"--init {config.init!r}: hosts share no disk: {convert}")
    _check_reachable("init", config.init)
    if isinstance(config, GrpoConfig) and config.rewards.judge in ("lm", "embedding"):
        _check_reachable("rewards.judge_model", config.rewards.judge_model)
    _check_reachable("data.train", config.data.train)
    if config.data.heldout:
        _check_reachable("data.heldout", config.data.heldout)
    chips = tpu_slice.chips * args.slices
    _check_mesh(config, chips)
    if not args.unplanned:
        print(f"planned: {find_plan(target, args.topology, fields)}", file=sys.stderr)
    speaks = any(source.startswith("world:") for source in (config.data.train, config.data.heldout or ""))
    extras = [*(["wandb"] if config.wandb else []), *(["world"] if speaks else [])]
    words = [target, "--workdir", given.workdir.rstrip("/"), "--coordinator", "auto", "--devices", str(chips)]
    return extras, [*words, *given.flags, *fields]


def _one_host(args: argparse.Namespace) -> list[str]:
    """Arguments of the stages that run on one host, unchanged. They read and write a bucket."""
    stage = args.stage
    if args.topology not in SINGLE_HOSTS or args.slices > 1:
        one = f"one of {', '.join(SINGLE_HOSTS)}"
        raise InputError(f"{stage}: takes one host ({one}); for more, start several jobs with --shard I/N")
    try:
        module = importlib.import_module(f"avocado_jax.cli.{stage}")
    except ModuleNotFoundError as error:
        raise InputError(f"{stage}: install the package here, which reads its arguments: no {error.name}") from None
    parser = _StageParser(stage)
    module.add_arguments(parser)
    given, unknown = parser.parse_known_args(args.words)
    if unknown:
        raise InputError(f"{stage}: no argument {unknown[0]!r}; options of the launcher come before {stage}")
    if stage == "caption" and not given.inputs and not given.manifest:
        raise InputError("caption: name clips to caption, or --manifest FILE")
    if stage == "evaluate" and given.benchmark != "world" and not given.videos and not given.captions:
        raise InputError("evaluate: --videos gs://BUCKET/FOLDER is required, or --captions FILE")
    for name in ONE_HOST[stage]:
        value = getattr(given, name)
        if name == "judge_model" and given.judge:  # the name of a model of the endpoint
            continue
        for one in [value] if isinstance(value, str) else value or []:
            _check_input(f"{stage}: {name}", one, name)
    if not re.fullmatch(OBJECT, given.out or ""):
        raise InputError(f"{stage}: out {given.out or ''!r}: the host's disk is temporary; write to gs://BUCKET/FOLDER")
    return args.words


class _StageParser(argparse.ArgumentParser):
    """The parser of a stage's arguments; its errors are InputErrors."""

    def __init__(self, stage: str) -> None:
        super().__init__(prog=stage, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


def _check_input(what: str, value: str, name: str) -> None:
    """Check that a host finds it: in a bucket, on the hub, or with the code."""
    from avocado_jax.checkpoint.references import is_hub  # not at the top: a laptop needs no more than configs

    packaged = value.startswith("avocado_jax/assets/") and (ROOT / value).exists()
    in_bucket = re.fullmatch(BUCKET + "(/.*)?", value)
    on_hub = (name in MODELS and is_hub(value)) or (name in DATA_SETS and value.startswith("hub:"))
    if not packaged and not in_bucket and not on_hub:
        raise InputError(f"{what} {value!r}: not on the host, whose disk is empty; copy it to gs://BUCKET/FOLDER")


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
    if not inside and not re.fullmatch(BUCKET + r"(/[A-Za-z0-9_=.-]+)*/?(:[a-z]+)?", inner):
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
