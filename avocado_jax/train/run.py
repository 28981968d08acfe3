"""Set up a run from a config: checkpoint, data, batch plan, mesh and training loop; supervised fine-tuning."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.checkpoint.convert import begin_run
from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import Checkpoint, load_sharded, open_checkpoint
from avocado_jax.checkpoint.references import pinned
from avocado_jax.checkpoint.training import Checkpoints
from avocado_jax.config import GrpoConfig, RunConfig, SftConfig, as_json, refuse_another
from avocado_jax.data import storage
from avocado_jax.data.index import Index
from avocado_jax.data.media import Reading, load_reading, reading_fields
from avocado_jax.data.pipeline import Batch, Recipe, Source, batches, plan_batches
from avocado_jax.data.plan import Bucket, Plan
from avocado_jax.data.prompt import PROMPTS, Habits, load_habits
from avocado_jax.data.records import Record
from avocado_jax.data.words import Words, load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.flops import train_flops
from avocado_jax.models.lora import add_adapters
from avocado_jax.parallel.backend import use_exact_fp32
from avocado_jax.parallel.batches import process_rows
from avocado_jax.parallel.compiled import Program, compile_ahead, log_compilations
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.programs import bound_compiled_programs
from avocado_jax.sampling.captioner import captioner_in_training
from avocado_jax.sampling.engine import caption_records
from avocado_jax.train.agree import agreed_batches, agreement
from avocado_jax.train.inputs import input_workers, open_source
from avocado_jax.train.loop import Job, train
from avocado_jax.train.metrics import Log
from avocado_jax.train.programs import batch_shapes, heldout_rows
from avocado_jax.train.sft import batch_totals, model_of, sft_program
from avocado_jax.train.startup import ready
from avocado_jax.train.state import State, rest_of
from avocado_jax.typing import Array

Measured = dict[str, tuple[Array, Array]]  # metric -> (sum over a batch, number of summands)


class Evaluator(NamedTuple):
    """The held-out evaluation of a stage.

    Attributes:
        evaluate: (state, step) -> entries for the step's line of metrics.
        rank: entries -> value to rank checkpoints by, lower is better; None: unranked.
        programs: the programs of the evaluation.
    """

    evaluate: Callable[[State, int], dict[str, Any]] = lambda state, step: {}
    rank: Callable[[dict[str, Any]], float | None] = lambda entries: None
    programs: Sequence[Program] = ()


class Setup(NamedTuple):
    """The opened inputs of a run; equal on all processes."""

    mesh: Mesh
    checkpoint: Checkpoint
    model: ThinkerConfig
    words: Words
    source: Source
    recipe: Recipe
    plan: Plan
    steps: int
    split: int  # rows of each clip


def set_up(config: RunConfig, split: int = 1, folder: str = "") -> Setup:
    """Open the checkpoint and the data of `config` and plan its batches. Each record takes `split` rows.

    Args:
        folder: the run folder, which stores the commit of an `init` on the hub.

    Raises:
        InputError: the config is inconsistent, or an input cannot be read.
    """
    bound_compiled_programs()
    use_exact_fp32(config.dtype)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices)
    parts = config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch * split % parts:
        raise InputError(f"batch: {config.batch * split} rows are not divided by data x fsdp x accumulate = {parts}")
    if not config.init:
        raise InputError("init: no checkpoint to begin with: --init REF names one")
    checkpoint = open_checkpoint(pinned(config.init, folder) if folder else config.init)
    model, words = model_of(config, checkpoint.config), load_words(checkpoint.config_folder)
    source, reading = open_source(config.data.train, config.data)
    if jax.process_index() == 0 and not config.data.train.startswith("world:"):
        warn_of_reading(config, reading, load_reading(checkpoint.config_folder))
    recipe = make_recipe(config, model, words, reading, load_habits(checkpoint.config_folder))
    grpo = isinstance(config, GrpoConfig)
    together, spares = (config.rollout_batches, config.oversample // config.batch) if grpo else (1, 0)
    plan = plan_batches(source.index, recipe, config.batch, config.data.shapes, config.seed, together, spares)
    steps = config.steps or together * max(1, round(config.epochs * plan.epoch_steps / (together + spares)))
    return Setup(mesh, checkpoint, model, words, source, recipe, plan, steps, split)


def warn_of_reading(config: RunConfig, prepared: Reading, expected: Reading) -> None:
    """Print a warning if the clips are sampled differently from those of the initial checkpoint."""
    if prepared == expected:
        return
    theirs, ours = _differences(prepared, expected)
    print(
        f"warning: {config.data.train} was prepared with {theirs}, but {config.init} samples clips with {ours}. "
        f"Unless that is intended, prepare the clips with --checkpoint {config.init}",
        file=sys.stderr,
    )


def _differences(*readings: Reading) -> list[str]:
    """Format the differing properties of two readings, one string per reading, as for `prepare --reading`."""
    first, second = map(reading_fields, readings)
    names = [name for name in second | first if first.get(name) != second.get(name)]
    return [", ".join(f"{name}={fields.get(name)}" for name in names) for fields in (first, second)]


def make_recipe(
    config: RunConfig, model: ThinkerConfig, words: Words, reading: Reading, habits: Habits = Habits()
) -> Recipe:
    """Build the recipe of a run. It does not depend on free config fields, so that a resumed run keeps its plan."""
    grpo = isinstance(config, GrpoConfig)
    return Recipe(
        config=model,
        words=words,
        reading=reading,
        prompts=(habits.prompt,) if habits.prompt else PROMPTS,
        habits=habits,
        group=config.group if grpo else config.data.references,
        caption_tokens=config.sampling.tokens if grpo else config.data.caption_tokens,
        sampled=grpo,
        max_lost_share=config.data.max_lost_share,
    )


def restored(
    config: RunConfig, setup: Setup, folder: str, checkpoints: Checkpoints, shapes: State, start: Callable
) -> State:
    """Restore the newest checkpoint in `folder`, or call `start` with the parameters of `init` if there is none.

    Raises:
        InputError: the checkpoint belongs to a run on other data.
    """
    if (newest := checkpoints.latest()) is None:
        params = load_sharded(setup.checkpoint, shapes.params)
        if setup.model.text.lora:
            params = add_adapters(params, shapes.params, config.seed)
        return start(params)
    params, rest, position = checkpoints.restore(newest, shapes.params, rest_of(shapes))
    if position["plan"] != setup.plan.digest:
        raise InputError(f"{config.data.train}: not the data that {folder} was begun with")
    return State(**rest | {"params": params})


def sft(config: SftConfig, folder: str) -> int:
    """Start, resume or finish the run in `folder` (local or gs://). Returns its exit status.

    Raises:
        InputError: the config is inconsistent, or the folder contains a run of another config.
    """
    setup = ready(config, folder, lambda: set_up(config, folder=folder))
    mesh, model = setup.mesh, setup.model
    open_folder(config, model, folder, setup.recipe.reading)
    checkpoints = Checkpoints(folder, config.keep)
    stops = stop_ids(setup.checkpoint.config_folder, setup.words, model.text.vocab)
    with jax.set_mesh(mesh):
        shapes, step, start = sft_program(config, model, mesh, setup.steps)
        state = restored(config, setup, folder, checkpoints, shapes, start)
        evaluator = _evaluator(config, setup, shapes, stops, folder)

        def programs(buckets: list[Bucket]) -> list[Program]:
            batches = [batch_shapes(config, model, bucket, mesh, config.batch) for bucket in buckets]
            steps = [Program("the step", step, (shapes, *batch)) for batch in batches]
            return agreement_programs(setup, buckets) + steps

        return run(
            config,
            setup,
            folder,
            checkpoints,
            state,
            programs,
            evaluator,
            step=lambda state, batch: (*step(state, batch.clip, batch.captions, batch.weight, batch.truncated), dict),
            flops=lambda batch, _: config.batch * _row_flops(config, model, batch),
        )


def run(
    config: RunConfig,
    setup: Setup,
    folder: str,
    checkpoints: Checkpoints,
    state: State,
    programs: Callable[[list[Bucket]], list[Program]],
    evaluator: Evaluator,
    batches: Callable[[int], Iterator[Batch]] | None = None,
    **stage: Callable,
) -> int:
    """Compile a stage's programs and run the loop over its steps. Returns the exit status.

    Args:
        programs: buckets of the remaining steps -> programs of the steps.
        batches: first step -> its batches and the following ones; by default `stream`.
        stage: `Job`'s step and flops.
    """
    if buckets := remaining_buckets(setup, int(state.step)):
        compile_ahead([*programs(buckets), *evaluator.programs])
    log_compilations()
    job = Job(
        steps=setup.steps,
        evaluate=evaluator.evaluate,
        rank=evaluator.rank,
        batches=batches or (lambda first: stream(setup, config, first)),
        rows=lambda number: int((setup.plan.step(setup.plan.position(number)).records >= 0).sum()),
        position={"plan": setup.plan.digest},
        checkpoint_every=config.checkpoint_every,
        checkpoint_minutes=config.checkpoint_minutes,
        eval_every=config.eval_every,
        max_skipped=config.max_skipped,
        profile=config.profile,
        **stage,
    )
    log = Log(folder, int(state.step), config.tensorboard, config.wandb, as_json(config))
    return train(job, state, setup.mesh, checkpoints, log, storage.join(folder, "profile"))


def remaining_buckets(setup: Setup, first: int) -> list[Bucket]:
    """The buckets of the steps from `first` on, in the order of their first use."""
    positions = map(setup.plan.position, range(first, setup.steps))
    return list(dict.fromkeys(setup.plan.step(position).bucket for position in positions))


def open_folder(config: RunConfig, model: ThinkerConfig, folder: str, reading: Reading) -> None:
    """Create the run folder, or check that it belongs to this config. config.json is written last."""
    where = storage.join(folder, "config.json")
    if storage.exists(where):
        refuse_another(config, json.loads(storage.read(where)), folder)
    elif jax.process_index() == 0:
        stated = asdict(reading)
        del stated["segment_seconds"]  # keep the value of `init`
        begin_run(config.init, folder, model.text.lora, stated)
        storage.write(where, json.dumps(as_json(config), indent=2).encode())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")


def stream(setup: Setup, config: RunConfig, first: int, references: Callable | None = None) -> Iterator[Batch]:
    """Yield batches on the mesh from step `first`, with the same rows on every process (`agreed_batches`).

    Spare batches follow the other batches of their block. `Batch.step` is the position in the plan (`Plan.position`).
    """
    workers, threads = input_workers(config.data.workers), config.data.threads
    total = setup.plan.batch * setup.split
    rows = [row // setup.split for row in process_rows(setup.mesh, total, jax.process_index())]
    first, stop = map(setup.plan.position, (first, setup.steps))
    read = batches(setup.source, setup.plan, setup.recipe, first, stop, rows, workers, threads)
    return agreed_batches(read, setup.mesh, setup.recipe, total, setup.split, references)


def agreement_programs(setup: Setup, buckets: Iterable[Bucket], references: Callable | None = None) -> list[Program]:
    """The programs that `stream` runs on batches of these buckets."""
    total = setup.plan.batch * setup.split
    return [agreement(setup.mesh, setup.recipe, bucket, total, setup.split, references) for bucket in buckets]


def heldout(config: RunConfig, setup: Setup) -> Setup:
    """The setup for one pass over the first `eval_rows` held-out clips, one row per clip.

    Raises:
        InputError: the held-out data was prepared with other settings than the training data.
    """
    source, reading = open_source(config.data.heldout, config.data)
    recipe = setup.recipe
    if reading != recipe.reading:
        theirs, ours = _differences(reading, recipe.reading)
        raise InputError(f"{config.data.heldout}: prepared with {theirs}, the training data with {ours}: must be equal")
    index = _first_records(source.index, config.eval_rows)
    batch = heldout_rows(config, len(index.ids)) if isinstance(config, GrpoConfig) else config.batch
    plan = plan_batches(index, recipe, batch, min(4, config.data.shapes), config.seed)
    return setup._replace(source=source, plan=plan, steps=plan.epoch_steps, split=1)


def heldout_means(
    config: RunConfig, evaluated: Setup, measure: Callable[[Batch], Measured], references: Callable | None = None
) -> dict[str, float]:
    """Compute means over the held-out clips, named `heldout_NAME`.

    Args:
        measure: batch -> for each name, the sum over the batch and the number of summands.
    """
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for batch in stream(evaluated, config, 0, references):
        for name, part in jax.device_get(measure(batch)).items():
            totals[name] += np.array(part, np.float64)
    return {f"heldout_{name}": float(total / max(count, 1)) for name, (total, count) in totals.items()}


def _row_flops(config: SftConfig, model: ThinkerConfig, batch: Batch) -> float:
    """Model FLOPs of a row without padding, estimated from the plan's padded share of the bucket's FLOPs."""
    flops = train_flops(model, batch.bucket.shape, config.data.references, batch.bucket.caption, config.train)
    return flops * (1 - batch.padded)


def _evaluator(config: SftConfig, setup: Setup, shapes: State, stops: tuple[int, ...], folder: str) -> Evaluator:
    """Evaluate loss and accuracy on the first `eval_rows` held-out clips; write captions of the first `samples`."""
    if not config.data.heldout:
        return Evaluator()
    recipe, evaluated = setup.recipe, heldout(config, setup)
    totals = jax.jit(partial(batch_totals, recipe.config), out_shardings=NamedSharding(setup.mesh, PartitionSpec()))
    source = evaluated.source
    samples = [source[number] for number in range(min(config.samples, len(source.index.ids)))]

    def evaluate(state: State, step: int) -> dict[str, Any]:
        def measure(batch: Batch) -> Measured:
            part = totals(state.params, batch.clip, batch.captions, batch.weight)
            return {"loss": (part.loss, part.count), "accuracy": (part.correct, part.count)}

        if samples:
            captions = _captions(config, recipe, state.params, stops, samples)
            if jax.process_index() == 0:
                lines = [json.dumps({"step": step, **caption}, ensure_ascii=False) + "\n" for caption in captions]
                storage.write(storage.join(folder, f"samples/{step}.jsonl"), "".join(lines).encode())
        return heldout_means(config, evaluated, measure)

    buckets = evaluated.plan.buckets
    batches = [batch_shapes(config, recipe.config, bucket, setup.mesh, config.batch) for bucket in buckets]
    programs = [Program("evaluation", totals, (shapes.params, *batch[:3])) for batch in batches]
    return Evaluator(evaluate, rank_by_loss, agreement_programs(evaluated, buckets) + programs)


def rank_by_loss(entries: dict[str, Any]) -> float | None:
    """Rank checkpoints by the held-out loss."""
    return entries.get("heldout_loss")


def _captions(
    config: SftConfig, recipe: Recipe, params: Any, stops: tuple[int, ...], records: list[Record]
) -> list[dict[str, Any]]:
    """Greedy captions of clips, with their references."""
    model = recipe.config
    captioner = captioner_in_training(
        model, params, recipe.words, stops, recipe.prompts[0], config.dtype, recipe.reading, recipe.habits
    )
    captions = caption_records(captioner, records, config.sample_tokens, len(records))
    return [
        {"id": record.fields["id"], "caption": caption, "reference": record.fields["caption"]}
        for record, caption in zip(records, captions)
    ]


def _first_records(index: Index, count: int) -> Index:
    """The index of the first `count` records."""
    return Index(*(column if isinstance(column, str) else column[:count] for column in index))
