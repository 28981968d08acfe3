"""Configs of training runs: frozen dataclasses in a Python file; `--a.b value` overrides a field.

A config file defines `config`. Fields made with `free` may change when a run is resumed. All others decide what the
run computes: a run folder with another value is refused.
"""

import difflib
import importlib.util
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from avocado_jax.errors import InputError
from avocado_jax.fields import OTHER_NAMES, check_field, same_path

PACKAGE = Path(__file__).parent


def free(default: Any) -> Any:
    """A field that may change when a run is resumed: it affects how the run computes, not the result."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh; one axis may be -1: all remaining devices."""

    data: int = free(1)  # replicas of the parameters
    fsdp: int = free(-1)  # shards of the parameters, each with its part of the rows
    tensor: int = free(1)  # shards of heads, hidden widths and vocabulary
    rollout_tensor: int = free(0)  # GRPO: the same of the sampler's weights, a multiple of `tensor`; 0: `tensor`
    slices: int = free(1)  # pod slices joined by the data-center network; parameters are replicated over them


@dataclass(frozen=True)
class DataConfig:
    """Training data. A source is a folder of `prepare`, `tfds:FOLDER:SPLIT`, or clips of AVWorld with no file:
    `world:LEVEL:SPLIT:SEED:CLIPS`, followed by `:plain` for plain captions, `:mixed` with an eighth of the clips
    silent, `:habits` with the faults of world/habits.py (keypoints and dialogues are unchanged), `:timestamps` for
    captions whose sentences begin with their times, or `:drills` for drills.
    """

    train: str = ""  # source of the training clips
    heldout: str = ""  # source whose loss (GRPO: its reward, never normalised) is measured every `eval_every` steps
    references: int = 1  # captions per clip
    caption_tokens: int = 1024  # SFT: longer captions are truncated and counted (GRPO: `sampling.tokens`)
    shapes: int = 8  # maximum number of compiled shapes
    max_lost_share: float = 0.02  # the run stops if more records cannot be read
    cache_dir: str = free("")  # local; copies of remote shards, and measurements of tfds sources
    workers: int = free(-1)  # processes that read and decode; 0: this process; -1: by the host (train/inputs.py)
    threads: int = free(2)  # rows prepared in parallel in each process


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, global-norm clipping, linear warm-up, cosine decay."""

    lr: float = 2e-5  # peak learning rate
    warmup: float = 0.05  # share of the steps; the first update has a positive rate, with 0 the full one
    final: float = 0.0  # share of `lr` that the cosine approaches at the last step
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decay of matrices, not of biases and norms
    clip_norm: float = 1.0  # maximum norm of the whole gradient


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the language model's linear maps, where `train` is "lora"."""

    rank: int = 16  # width of each adapter
    alpha: float = 16.0  # their output counts alpha / rank


@dataclass(frozen=True)
class SplashConfig:
    """Block sizes of the "splash" kernel: queries and keys of one step, at most; multiples of 128."""

    q: int = free(512)  # queries of the forward pass
    kv: int = free(512)  # keys of the forward pass
    q_backward: int = free(512)  # queries of the backward pass
    kv_backward: int = free(512)  # keys of the backward pass


@dataclass(frozen=True)
class NominalConfig:
    """What `plan` assumes if the checkpoint or the data is not available."""

    model: str = free("7b")  # "7b", "3b" or "tiny"
    clip: tuple[int, ...] = free((28032, 99, 30, 50))  # largest shape: tokens, temporal patches, windows, chunks


@dataclass(frozen=True)
class SamplingConfig:
    """How captions are sampled from the policy."""

    tokens: int = 4096  # maximum length of a caption, including the stop token
    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # sample from so many most probable tokens; 0: all
    top_p: float = 1.0  # probability mass to sample from; 1: all


@dataclass(frozen=True)
class ObjectiveConfig:
    """The GRPO objective (formulas: train/objective.py)."""

    advantage: str = "std"  # advantage of a reward within its group: "std": (r - mean) / std; "mean": r - mean
    std_floor: float = 1e-3  # lower bound of a group's std
    ratio: str = "token"  # level of the policy ratio: "token", or "sequence" (GSPO)
    clip_low: float = 0.2  # ratios are clipped at 1 - clip_low
    clip_high: float = 0.2  # ratios are clipped at 1 + clip_high
    kl: str = "k3"  # estimator of the KL to the reference: "k1", "k2", "k3"
    beta: float = 0.04  # weight of the KL; 0: no reference model
    aggregate: str = "sequence"  # mean over tokens: "sequence" (GRPO), "token" (DAPO), "constant" (Dr. GRPO)
    importance_cap: float = 0.0  # cap of the weights p(trainer) / p(sampler) of policy loss and KL; 0: no weights
    mask_overlong: bool = False  # truncated captions have no loss


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a caption (rewards/README.md): a weighted sum of terms; a weight of 0 excludes a term."""

    checklist: float = 1.0  # R_C: keypoints of the reference that it states
    dialogue: float = 1.0  # R_D: lines and speakers
    length: float = 1.0  # R_L: ending in time
    repetition: float = 0.0  # -1 where it collapses into repetition
    timing: float = 0.0  # F1 of the time IoU of its `[start - end]` scenes with the events of the reference
    probes: float = 0.0  # probes of the reference that a judge answers rightly from the caption alone
    extra: tuple[str, ...] = ()  # a user's terms: jax:MODULE:FUNCTION=WEIGHT or host:MODULE:FUNCTION=WEIGHT, ...
    normalize: bool = False  # each term over its deviation in the group before it is weighted (GDPO)
    gate: bool = False  # a caption that collapses has no credit for dialogue
    low: int = 2048  # tokens from which R_L falls from 1
    high: int = 4096  # tokens from which R_L is 0
    judge: str = "lexical"  # judge of R_C: "lexical", "remote", "lm" or "embedding" (rewards/README.md)
    judge_model: str = ""  # model reference of an "lm" or "embedding"; name at the endpoint of a "remote"
    judge_url: str = free("")  # endpoint of a "remote" judge: https://HOST/v1; its key is in OPENAI_API_KEY
    judge_cache: str = free("")  # local folder for a "remote" judge's answers; a resumed run repeats no request
    judge_patience: float = free(600.0)  # seconds that a step waits for a "remote" judge
    max_unjudged: float = free(0.1)  # the run stops if a larger share of a step's keypoints or probes has no answer
    probe_judge: str = "lm"  # judge of the probes: "lm" or "remote"
    probe_model: str = ""  # as `judge_model`; empty: the same. Equal judges of both terms are loaded once
    long_units: bool = True  # sentences of 100 to 400 characters that are repeated three times are repetition too
    idf: str = ""  # local JSON lines of captions that give the rarity of words; empty: all content words weigh the same
    covered_low: float = 0.35  # share of a keypoint's words from which the lexical judge finds it stated in part
    covered_high: float = 0.65  # share from which it is stated in full
    keypoints: int = 64  # maximum number of keypoints per reference
    lines: int = 32  # maximum number of dialogue lines that are compared
    scenes: int = 64  # maximum number of timed scenes and of events that are compared
    questions: int = 20  # maximum number of probes per reference
    merge: bool = False  # compare consecutive lines of one speaker as one line (DiaDem's evaluation)


@dataclass(frozen=True)
class TimeoutConfig:
    """Seconds after which a host stops waiting (parallel/liveness.py)."""

    start: int = free(1800)  # for all hosts to start, and for all to pass the start-up checks
    heartbeat: int = free(60)  # without a heartbeat of a host, after which the others end
    step: int = free(1800)  # without a finished step, evaluation, save or compilation: exit with 75; 0: no limit


@dataclass(frozen=True)
class RunConfig:
    """Fields of every training run."""

    init: str = ""  # a checkpoint: folder in Hugging Face format or run, local or gs://; or ORG/NAME[@REVISION]
    seed: int = 0  # seed of every random number of the run
    steps: int = 0  # number of steps; 0: `epochs` of the data
    epochs: float = 2.0  # passes over the data, where `steps` is 0
    batch: int = 128  # clips per step, over all devices
    accumulate: int = free(1)  # microbatches per batch
    train: str = "captioner"  # "captioner": adapters and language model; "all"; "adapters"; "lora" and adapters
    lora: LoraConfig = LoraConfig()
    dtype: str = "bfloat16"  # dtype of activations; trained parameters, their gradients and moments are float32
    frozen_dtype: str = "bfloat16"  # dtype of frozen parameters
    remat: str = free("full")  # what the backward pass recomputes: "none", "dots", "full", "offload"
    attention: str = free("auto")  # "auto": the platform's kernel; "plain", "splash", "cudnn"
    splash: SplashConfig = SplashConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint_every: int = free(500)  # steps between two checkpoints
    checkpoint_minutes: float = free(0.0)  # a checkpoint also after so many minutes without one; 0: off
    keep: int = free(2)  # newest checkpoints to keep; the best by held-out loss or reward is kept too
    eval_every: int = 500  # steps between two evaluations; part of what the run is, since metrics.jsonl has them
    eval_rows: int = 128  # maximum number of held-out clips
    max_skipped: int = 20  # the run stops after so many steps in a row without a finite gradient
    profile: tuple[int, ...] = free(())  # steps (first, last) traced by jax.profiler into RUN/profile
    tensorboard: bool = free(True)  # write RUN/tensorboard
    nominal: NominalConfig = NominalConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    wandb: str = free("")  # a project's name; needs `pip install 'avocado-jax[wandb]'`


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning on captions (paper, 4.1)."""

    samples: int = 4  # captions of held-out clips written at each evaluation
    sample_tokens: int = 256  # maximum length of each


@dataclass(frozen=True)
class GrpoConfig(RunConfig):
    """Group-relative policy optimisation on rewards (paper, 4.2)."""

    epochs: float = 1.0
    batch: int = 8  # clips per step, over all devices
    group: int = 8  # captions sampled per clip
    split: int = free(1)  # rows of a clip, if there are more devices than clips; fixed where rollout_batches exceeds 1
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rollout_batches: int = 1  # batches whose captions are sampled together; then each has its update
    rollout_int8: bool = False  # sample with int8 kernels, held-out captions too; needs `objective.importance_cap`
    oversample: int = 0  # spare clips per rollout, a multiple of `batch`; they replace groups of equal rewards
    passes: int = 1  # passes over each batch
    minibatches: int = 1  # updates per pass
    reference_dtype: str = "bfloat16"  # dtype of the parameters of the reference model
    eval_tokens: int = 2048  # maximum length of a held-out caption; at most `sampling.tokens`
    optim: OptimConfig = OptimConfig(lr=1e-5)
    checkpoint_every: int = free(50)
    eval_every: int = 50


def as_sft(config: RunConfig) -> SftConfig:
    """The SFT config with the same data, steps and batch as `config`."""
    return SftConfig(**{entry.name: getattr(config, entry.name) for entry in fields(RunConfig)})


def config_file(name: str) -> Path:
    """Find a config file: a path, or a config of this package (`sft_7b`, `configs/sft_7b.py`). ".py" is optional.

    Raises:
        InputError: there is no such file.
    """
    if (path := Path(name)).is_file():
        return path
    folder = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())  # wheel, clone
    parents = [path.parent, folder] if path.parent == Path("configs") else [path.parent]
    for parent in [folder, path.parent] if name == path.name else parents:
        if (file := parent / f"{path.name.removesuffix('.py')}.py").is_file():
            return file
    names = ", ".join(sorted(file.stem for file in folder.glob("*.py")))
    raise InputError(f"{name}: no such config file; configs with a name: {names}")


def load(path: str, overrides: Sequence[str] = ()) -> Any:
    """The `config` of a Python file, with fields changed by `["--a.b", "value", ...]` or `["--a.b=value"]`.

    Args:
        path: as in `config_file`.

    Raises:
        InputError: no such file, no config in it, an unknown field, or a value of the wrong kind.
    """
    file = config_file(path)
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
        config = _changed(config, name, name.split("."), value, config)
    if isinstance(config, RunConfig):
        _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Raise InputError if a value is outside its domain."""
    for name, value, _ in flat(config):
        check_field(name, value)
    if isinstance(config, GrpoConfig) and config.oversample % config.batch:
        raise InputError(f"oversample: {config.oversample} clips are not a multiple of batch = {config.batch}")
    if isinstance(config, SftConfig) and config.mesh.rollout_tensor:
        raise InputError("mesh.rollout_tensor: only GRPO has rollouts")
    if (window := config.profile) and (len(window) > 2 or not 1 <= window[0] <= window[-1]):
        raise InputError(f"profile: {','.join(map(str, window))} is not FIRST,LAST with 1 <= FIRST <= LAST")
    for name, size in asdict(config.splash).items():
        if size < 128 or size % 128:
            raise InputError(f"splash.{name}: {size} is not a multiple of 128")
    if config.data.cache_dir.startswith("gs://"):
        raise InputError(f"data.cache_dir: {config.data.cache_dir} must be a local folder: it has copies of a bucket")


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    given = iter(overrides)
    for flag in given:
        if not flag.startswith("--"):
            raise InputError(f"{flag}: fields are set by --name value")
        name, equals, value = flag[2:].partition("=")
        if not equals and (value := next(given, None)) is None:
            raise InputError(f"--{name}: its value is missing")
        yield name, value


def _nearest(config: Any, name: str) -> str | None:
    """The field with the most similar name; for nested fields the last part of the name is compared too."""
    every = [field for field, _, _ in flat(config)]
    last = name.rpartition(".")[2]
    known = OTHER_NAMES.get(last.replace("_", "").replace("-", "").lower())
    if known in every or known == "workdir" != name:  # the option beside the fields
        return known
    lasts = {field.rpartition(".")[2]: field for field in reversed(every)}
    if last in lasts:
        return lasts[last]
    if close := difflib.get_close_matches(name, every, 1):
        return close[0]
    close = difflib.get_close_matches(last, list(lasts), 1)
    return lasts[close[0]] if close else None


def _changed(config: Any, name: str, path: list[str], text: str, root: Any) -> Any:
    known = typing.get_type_hints(type(config))
    first, *rest = path
    if first not in known:
        nearest = _nearest(root, name)
        command = "grpo" if isinstance(root, GrpoConfig) else "sft"
        more = f"did you mean {nearest}?" if nearest else f"avocado {command} --help lists all"
        raise InputError(f"--{name}: no such field; {more}")
    current = getattr(config, first)
    if rest and not is_dataclass(current):
        raise InputError(f"--{name}: {first} has no subfields")
    if is_dataclass(current) and not rest:
        names = ", ".join(f"--{name}.{entry.name}" for entry in fields(current))
        raise InputError(f"--{name}: give one of its fields: {names}")
    value = _changed(current, name, rest, text, root) if rest else _parsed(known[first], text, name)
    return replace(config, **{first: value})


def _parsed(kind: Any, text: str, name: str) -> Any:
    """Parse a value of the field's type."""
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
    """Yield all fields as (dotted name, value, whether it is free)."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value, bool(entry.metadata.get("free"))


def as_json(config: Any) -> dict[str, Any]:
    """The config as JSON data, the content of `RUN/config.json`."""
    return {"kind": type(config).__name__, **asdict(config)}


def refuse_another(config: Any, stored: dict[str, Any], where: str) -> None:
    """Compare a config with the stored config of a run folder. Missing fields have their defaults.

    Raises:
        InputError: fields that are not free differ. The message names them.
    """

    defaults = {name: value for name, value, _ in flat(type(config)())}

    def at(name: str) -> Any:
        value: Any = stored
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                return defaults[name]  # the field is newer than the folder
            value = value[key]
        return tuple(value) if isinstance(value, list) else value

    fixed = ((name, at(name), value) for name, value, is_free in flat(config) if not is_free)
    changed = {name: (there, here) for name, there, here in fixed if there != here and not same_path(name, there, here)}
    differ = [f"{name} ({there} there, {here} here)" for name, (there, here) in changed.items()]
    if stored.get("kind") != type(config).__name__:
        differ = [f"kind ({stored.get('kind')} there, {type(config).__name__} here)"]
    if differ:
        more = f"; to train longer, begin another run with --init {where}" if {"steps", "epochs"} & {*changed} else ""
        raise InputError(f"{where}: begun with another config: {', '.join(differ)}{more}")
