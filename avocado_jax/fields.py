"""Fields of configs: their domains, and their descriptions for `--help`."""

import inspect
import math
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from avocado_jax.errors import InputError

DTYPES = ("float32", "bfloat16")
TERM_KINDS = ("jax", "host")  # of a user's reward term (rewards/extra.py)
CHOICES = {
    "train": ("captioner", "all", "adapters", "lora"),
    "dtype": DTYPES,
    "frozen_dtype": DTYPES,
    "reference_dtype": DTYPES,
    "remat": ("none", "dots", "full", "offload"),
    "attention": ("auto", "plain", "splash", "cudnn"),
    "nominal.model": ("7b", "3b", "tiny"),
    "objective.advantage": ("std", "mean"),
    "objective.ratio": ("token", "sequence"),
    "objective.kl": ("k1", "k2", "k3"),
    "objective.aggregate": ("sequence", "token", "constant"),
    "rewards.judge": ("lexical", "remote", "lm", "embedding"),
    "rewards.probe_judge": ("lm", "remote"),
}
# Bounds of numbers. Without an entry integers are at least 1, other numbers at least 0.
NATURAL, SHARE, ANY = (0, math.inf), (0, 1), (-math.inf, math.inf)
BOUNDS = {
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("steps", "samples", "oversample", "sampling.top_k", "rewards.low", "timeouts.step"), NATURAL),
    **dict.fromkeys(("optim.warmup", "optim.final", "optim.beta1", "optim.beta2"), SHARE),
    **dict.fromkeys(("data.max_lost_share", "objective.clip_low", "rewards.max_unjudged"), SHARE),
    **dict.fromkeys(("rewards.covered_low", "rewards.covered_high"), SHARE),
    **dict.fromkeys((f"rewards.{term}" for term in ("checklist", "dialogue", "length", "repetition")), ANY),
    **dict.fromkeys(("rewards.timing", "rewards.probes"), ANY),
    "sampling.temperature": (1e-3, math.inf),
    "sampling.top_p": (1e-6, 1),
    "mesh.rollout_tensor": NATURAL,
    "data.workers": (-1, math.inf),  # -1: by the host
}
# Names of other trainers, without "_" and "-".
OTHER_NAMES = {
    "learningrate": "optim.lr",
    "maxgradnorm": "optim.clip_norm",
    "warmupratio": "optim.warmup",
    "batchsize": "batch",
    "gradientaccumulationsteps": "accumulate",
    "maxsteps": "steps",
    "numtrainepochs": "epochs",
    "numgenerations": "group",
    "checkpoint": "init",
    "model": "init",
    "dataset": "data.train",
    "perdevicetrainbatchsize": "batch",
    "gradaccum": "accumulate",
    "gradientcheckpointing": "remat",
    "tensorparallel": "mesh.tensor",
    "tensorparallelsize": "mesh.tensor",
    "bf16": "dtype",
    "fp16": "dtype",
    "precision": "dtype",
    "savesteps": "checkpoint_every",
    "evalsteps": "eval_every",
    "maxlength": "data.caption_tokens",
    "maxcompletionlength": "sampling.tokens",
    "klcoef": "objective.beta",
    "reportto": "wandb",
    "wandbproject": "wandb",
    "outputdir": "workdir",
    "workdir": "workdir",
}
MEANING = 46  # column of the meanings in `field_help`
AXES = ("mesh.data", "mesh.fsdp", "mesh.tensor")


class Description(NamedTuple):
    """A field, or the heading of nested fields, whose name ends in "." and whose type is empty."""

    name: str  # dotted
    kind: str  # its type
    default: str
    meaning: str


class UserTerm(NamedTuple):
    """A user's reward term, parsed from `rewards.extra`."""

    kind: str  # of TERM_KINDS
    module: str
    function: str
    weight: float


def parse_term(text: str) -> UserTerm:
    """Parse KIND:MODULE:FUNCTION=WEIGHT; the default weight is 1. The module is not imported.

    Raises:
        InputError: `text` is malformed, or the weight is not a finite number.
    """
    which, equals, weight = text.partition("=")
    kind, _, rest = which.partition(":")
    module, _, function = rest.partition(":")
    if kind not in TERM_KINDS or not module or not function:
        raise InputError(f"a term is jax:MODULE:FUNCTION=WEIGHT or host:MODULE:FUNCTION=WEIGHT, not {text!r}")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{text}: {weight!r} is not a weight")
    return UserTerm(kind, module, function, value)


def check_field(name: str, value: Any) -> None:
    """Check that a value is in the domain of its field.

    Args:
        name: dotted name, such as `optim.lr`.

    Raises:
        InputError: the value is not in the domain, which the message states.
    """
    if name in CHOICES and value not in CHOICES[name]:
        raise InputError(f"{name}: {value!r} is not one of {', '.join(CHOICES[name])}")
    if name == "rewards.extra":
        for text in value:
            _check_term(name, text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if name in AXES:
        if value != -1 and value < 1:
            raise InputError(f"{name}: {value} is neither -1 (all remaining devices) nor a number from 1")
        return
    low, high = BOUNDS.get(name, (1 if isinstance(value, int) else 0, math.inf))
    if not (low <= value <= high and math.isfinite(value)):
        domain = "a finite number" if low == -math.inf else f"a number from {low:g}"
        raise InputError(f"{name}: {value} is not {domain}" + (f" to {high:.10g}" if high < math.inf else ""))


def _check_term(name: str, text: str) -> None:
    try:
        parse_term(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def same_path(name: str, there: Any, here: Any) -> bool:
    """Whether two values of a field are the same local path, for example one relative and one absolute."""
    if name not in ("init", "data.train", "data.heldout") or not there or not here or ":" in f"{there}{here}":
        return False
    return Path(there).resolve() == Path(here).resolve()


def describe(config: Any, prefix: str = "") -> Iterator[Description]:
    """Describe all fields of a config in order. The meaning of a field is its comment in the source."""
    comments = _comments(type(config))
    for entry in fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            yield Description(
                f"{name}.", "", "", comments[entry.name] or " ".join((inspect.getdoc(value) or "").split())
            )
            yield from describe(value, f"{name}.")
        else:
            default = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            kind = f"{get_args(entry.type)[0].__name__},..." if isinstance(value, tuple) else type(value).__name__
            yield Description(name, kind, default.lower() if kind == "bool" else default, comments[entry.name])


def field_help(config: Any) -> str:
    """Format all fields of a config for the end of `--help`."""
    width = max(60, min(120, shutil.get_terminal_size().columns)) - 2
    lines = ["fields of the config, each --NAME VALUE, with type, default and meaning:"]
    for description in describe(config):
        if not description.kind:
            lines += [
                "",
                *textwrap.wrap(
                    f"{description.name}  {description.meaning}", width, initial_indent="  ", subsequent_indent="    "
                ),
            ]
            continue
        left = f"  --{description.name} {description.kind.upper()} = {description.default or repr('')}"
        meaning = textwrap.wrap(description.meaning, width - MEANING)
        if len(left) > MEANING - 2:
            lines.append(left)
            left = ""
        lines.append(f"{left:{MEANING}}{meaning[0]}")
        lines += [" " * MEANING + rest for rest in meaning[1:]]
    return "\n".join(lines)


def _comments(kind: type) -> dict[str, str]:
    """The source comment of each field of a dataclass. Redeclared fields without a comment inherit it."""
    found: dict[str, str] = {}
    for base in kind.__mro__[:-1]:
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
                found[match[1]] = found.get(match[1]) or match[2] or ""
    return found
