"""What a run is told: frozen dataclasses, written in a Python file, any field changed as `--a.b value`.

A config file defines `config`. Fields made with `free` may differ when a run is resumed; all others decide what
the run computes, and a run folder that holds another value is refused.
"""

import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from avocado_jax.errors import InputError


def free(default: Any) -> Any:
    """A field that may change between the starts of one run: it decides how, not what, is computed."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out; -1 once: all that are left."""

    data: int = free(1)  # copies of the parameters
    fsdp: int = free(-1)  # parts of the parameters, each with rows of its own
    tensor: int = free(1)  # parts of heads, hidden widths and vocabulary
    slices: int = free(1)  # pod slices joined by the data-center network: copies over them, beside `data`


@dataclass(frozen=True)
class DataConfig:
    """What is learned from. A source is a folder of `prepare`, `tfds:FOLDER:SPLIT`, or clips of AVWorld with no file:
    `world:LEVEL:SPLIT:SEED:CLIPS`, with `:plain` behind it for plain captions,
    `:mixed` for these with an eighth of the clips silent, `:habits` for these with the faults of world/habits.py
    (keypoints and dialogues stay whole), or `:drills` for their parts.
    """

    train: str = ""
    heldout: str = ""  # its loss is measured every `eval_every` steps
    references: int = 1  # captions a clip
    caption_tokens: int = 1024  # longer captions are cut and counted
    shapes: int = 8  # compiled shapes at most
    max_lost_share: float = 0.02  # records that cannot be read, past which the run stops
    cache_dir: str = free("")  # copies of remote shards, and measurements of tfds sources
    workers: int = free(0)  # processes that read and decode; 0: none but this one
    threads: int = free(2)  # rows made at once in each process


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine to zero."""

    lr: float = 2e-5
    warmup: float = 0.05  # share of the steps
    final: float = 0.0  # share of `lr` at the last step
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices, not of biases and norms
    clip_norm: float = 1.0  # of the whole gradient


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the language model's linear maps, where `train` is "lora"."""

    rank: int = 16
    alpha: float = 16.0  # their output counts alpha / rank


@dataclass(frozen=True)
class NominalConfig:
    """What `plan` assumes where the checkpoint, or the data, is not at hand."""

    model: str = free("7b")  # "7b", "3b" or "tiny"
    clip: tuple[int, ...] = free((28032, 99, 30, 50))  # of the dearest shape: tokens, temporal patches, windows, chunks


@dataclass(frozen=True)
class SamplingConfig:
    """How captions are sampled from the policy."""

    tokens: int = 4096  # of a caption at most, the stop included
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """What GRPO maximises (train/objective.py has the formulas)."""

    advantage: str = "std"  # of a reward within its group: "std": (r - mean) / std; "mean": r - mean
    std_floor: float = 1e-3  # under which a group's std is not taken
    ratio: str = "token"  # of policies: "token", or "sequence" (GSPO)
    clip_low: float = 0.2  # ratios under 1 - clip_low win nothing more
    clip_high: float = 0.2  # nor do those over 1 + clip_high
    kl: str = "k3"  # estimate of the distance to the reference: "k1", "k2", "k3"
    beta: float = 0.04  # what it counts; 0: there is no reference
    aggregate: str = "sequence"  # of tokens: "sequence" (GRPO), "token" (DAPO), "constant" (Dr. GRPO)
    importance_cap: float = 0.0  # of the trainer's over the sampler's probability; 0: not corrected
    mask_overlong: bool = False  # captions that reached the limit without a stop count for nothing


@dataclass(frozen=True)
class RewardConfig:
    """What a caption is rewarded for (rewards/README.md): a weighted sum; a weight of 0 leaves a term out of it."""

    checklist: float = 1.0  # R_C: keypoints of the reference that it states
    dialogue: float = 1.0  # R_D: lines and speakers
    length: float = 1.0  # R_L: ending in time
    repetition: float = 0.0  # -1 where it collapses into repetition
    normalize: bool = False  # each term over its deviation in the group before it is weighted (GDPO)
    gate: bool = False  # a caption that collapses has no credit for dialogue
    low: int = 2048  # tokens from which R_L falls from 1
    high: int = 4096  # to 0
    judge: str = "lexical"  # of R_C: by their words, or "remote", "lm", "embedding" (rewards/README.md)
    judge_model: str = ""  # the folder of the last two; what the remote one is called where it is asked
    judge_url: str = free("")  # of the remote one: https://HOST/v1; its key is in OPENAI_API_KEY
    judge_cache: str = free("")  # a folder that keeps its answers; with it a resumed run asks nothing twice
    judge_patience: float = free(600.0)  # seconds that the captions of a step wait for it
    max_unjudged: float = free(0.1)  # share of a step's keypoints without an answer, past which the run stops
    covered_low: float = 0.35  # share of a keypoint's words from which the lexical judge finds it stated in part
    covered_high: float = 0.65  # and in full
    keypoints: int = 64  # of a reference that are looked for, at most
    lines: int = 32  # of dialogue that are compared, at most


@dataclass(frozen=True)
class TimeoutConfig:
    """Seconds after which a host stops waiting (parallel/liveness.py)."""

    start: int = free(1800)  # for all hosts to start, and for all to pass the start-up checks
    heartbeat: int = free(60)  # without a heartbeat of a host, after which the others end
    step: int = free(1800)  # without a finished step, evaluation, save or compilation: exit with 75; 0: no limit


@dataclass(frozen=True)
class RunConfig:
    """What every training run is told."""

    init: str = ""  # a checkpoint: Hugging Face folder or run
    seed: int = 0
    steps: int = 0  # 0: `epochs` of the data
    epochs: float = 2.0
    batch: int = 128  # clips a step, over all devices
    accumulate: int = free(1)  # parts of a batch, one after the other
    train: str = "captioner"  # "captioner": adapters and language model; "all"; "adapters"; "lora": with adapters
    lora: LoraConfig = LoraConfig()
    dtype: str = "bfloat16"  # of activations
    param_dtype: str = "float32"  # of trained parameters, their gradients and moments
    frozen_dtype: str = "bfloat16"  # of parameters that are not trained
    remat: str = free("full")  # what the backward pass recomputes: "none", "dots", "full", "offload"
    attention: str = free("auto")  # "auto": the platform's kernel; "plain", "splash", "cudnn"
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint_every: int = free(500)  # steps
    checkpoint_minutes: float = free(0.0)  # a checkpoint also after so many minutes without one; 0: off
    keep: int = free(2)  # newest checkpoints; the best by held-out loss is kept beside them
    eval_every: int = 500  # steps; it adds to metrics.jsonl, so it is part of what the run is
    eval_rows: int = 128  # held-out clips at most
    max_skipped: int = 20  # steps in a row whose gradient is not finite, after which the run stops
    profile: tuple[int, ...] = free(())  # steps (first, last) traced by jax.profiler into RUN/profile
    tensorboard: bool = free(True)
    nominal: NominalConfig = NominalConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    wandb: str = free("")  # a project's name; needs `pip install 'avocado-jax[wandb]'`


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning on captions (paper, 4.1)."""

    samples: int = 4  # captions of held-out clips that are written at each evaluation
    sample_tokens: int = 256  # of each at most


@dataclass(frozen=True)
class GrpoConfig(RunConfig):
    """Group-relative policy optimisation on rewards (paper, 4.2)."""

    epochs: float = 1.0
    batch: int = 8  # clips a step, over all devices
    group: int = 8  # captions sampled of each
    split: int = free(1)  # rows that the captions of a clip are spread over, where there are more devices than clips
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    passes: int = 1  # over each rollout
    minibatches: int = 1  # of a pass, an update each
    reference_dtype: str = "bfloat16"  # of the first policy's parameters, which are kept beside the trained ones
    optim: OptimConfig = OptimConfig(lr=1e-5)
    checkpoint_every: int = free(50)  # steps
    eval_every: int = 50


def as_sft(config: RunConfig) -> SftConfig:
    """Fine-tuning on the captions of the clips that `config` learns from: as many steps of as many clips."""
    return SftConfig(**{one.name: getattr(config, one.name) for one in fields(RunConfig)})


def load(path: str, overrides: Sequence[str] = ()) -> Any:
    """The `config` of a Python file, with fields changed by `["--a.b", "value", ...]` or `["--a.b=value"]`.

    Raises:
        InputError: no such file, no config in it, an unknown field, or a value of the wrong kind.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location("avocado_config", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not is_dataclass(config) or isinstance(config, type):
        raise InputError(f"{path}: defines no `config`")
    for name, value in _pairs(overrides):
        config = _changed(config, name, name.split("."), value)
    if isinstance(config, RunConfig):
        _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Check values that their types do not check.

    Raises:
        InputError: a value is out of its domain.
    """
    if not 0 <= config.checkpoint_minutes < math.inf:
        raise InputError(f"checkpoint_minutes: {config.checkpoint_minutes} is not a number of minutes from 0 (off)")
    if (window := config.profile) and (len(window) > 2 or not 1 <= window[0] <= window[-1]):
        raise InputError(f"profile: {','.join(map(str, window))} is not FIRST,LAST with 1 <= FIRST <= LAST")
    if config.data.cache_dir.startswith("gs://"):
        raise InputError(f"data.cache_dir: {config.data.cache_dir} must be a local folder: it has copies of a bucket")


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    given = iter(overrides)
    for flag in given:
        if not flag.startswith("--"):
            raise InputError(f"{flag}: a field is given as --name value")
        name, equals, value = flag[2:].partition("=")
        if not equals and (value := next(given, None)) is None:
            raise InputError(f"--{name}: its value is missing")
        yield name, value


def _changed(config: Any, name: str, path: list[str], text: str) -> Any:
    known = typing.get_type_hints(type(config))
    first, *rest = path
    if first not in known:
        every = [name for name, _, _ in flat(config)]
        close = difflib.get_close_matches(first, list(known), 1) or difflib.get_close_matches(name, every, 1)
        raise InputError(f"--{name}: no such field" + (f"; did you mean {close[0]}?" if close else ""))
    held = getattr(config, first)
    if rest and not is_dataclass(held):
        raise InputError(f"--{name}: {first} has no fields of its own")
    if is_dataclass(held) and not rest:
        raise InputError(f"--{name}: give one of its fields: {', '.join(f'--{name}.{f.name}' for f in fields(held))}")
    value = _changed(held, name, rest, text) if rest else _parsed(known[first], text, name)
    return replace(config, **{first: value})


def _parsed(kind: Any, text: str, name: str) -> Any:
    """A value of the field's type."""
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            return tuple(_parsed(inner, part, name) for part in text.split(",") if part)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (ValueError, KeyError):
        wanted = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)
        raise InputError(f"--{name}: {text!r} is not of type {wanted}") from None


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every field as (dotted name, value, whether it is free)."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value, bool(each.metadata.get("free"))


def as_json(config: Any) -> dict[str, Any]:
    """The config as plain data, as `RUN/config.json` holds it."""
    return {"kind": type(config).__name__, **asdict(config)}


def refuse_another(config: Any, held: dict[str, Any], where: str) -> None:
    """Compare with what a run folder was begun with.

    Raises:
        InputError: fields that are not free differ; the message names them.
    """

    def at(name: str) -> Any:
        value: Any = held
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return tuple(value) if isinstance(value, list) else value

    decided = ((name, at(name), value) for name, value, loose in flat(config) if not loose)
    differ = [f"{name} ({there} there, {here} here)" for name, there, here in decided if there != here]
    if held.get("kind") != type(config).__name__:
        differ = [f"kind ({held.get('kind')} there, {type(config).__name__} here)"]
    if differ:
        raise InputError(f"{where}: begun with another config: {', '.join(differ)}")
