"""The input pipeline: Grain workers build rows from plan entries, and the main process stacks rows to batches.

The position is the step: `batches(..., first=step)` resumes exactly there, with any number of hosts and workers.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from avocado_jax.data.features import log_mel
from avocado_jax.data.index import Index, Sizes, sizes
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.plan import Bucket, Plan, choose_buckets, make_plan
from avocado_jax.data.prompt import PROMPTS, Habits, Prompt, record_prompt, special_id
from avocado_jax.data.records import Record, decoded
from avocado_jax.data.rows import make_row, stack
from avocado_jax.data.storage import StorageError, within
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Captions, Clip, Float, Int, Shaped

PROMPT, REFERENCES = 3, 4  # purposes of random keys
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TRIAL = 200  # minimum rows for the share of lost rows


@runtime_checkable
class Source(Protocol):
    """Random access to records by their index. Pickled to worker processes."""

    index: Index

    def __getitem__(self, number: int) -> Record: ...


class Lost(NamedTuple):
    """A record that became a row of zero weight."""

    step: int
    id: str
    reason: str


class Batch(NamedTuple):
    """This host's rows of one batch of the plan."""

    step: int
    epoch: int
    bucket: Bucket
    ids: tuple[str, ...]  # "" in padding rows
    records: tuple[dict[str, Any], ...]  # the manifest fields of each row, used as reward references
    clip: Clip
    captions: Captions | None  # None if the recipe's captions are sampled
    weight: Float[Array, "B"]  # 1, or 0 for padding rows and lost records
    truncated: Int[Array, "B"]  # number of each row's captions that were longer than the bucket
    padded: float  # share of the step's FLOPs, over all hosts, spent on padding
    lost: tuple[Lost, ...]  # records that this host could not read
    references: Any = None  # GRPO: reward references as arrays [B, ...]
    following: tuple["Batch", ...] = ()  # GRPO: later batches sampled together with this one
    spares: tuple["Batch", ...] = ()  # GRPO: spare batches sampled together with this one


@dataclass(frozen=True)
class Recipe:
    """Settings for building rows from records; the same on all hosts."""

    config: ThinkerConfig
    words: Words
    reading: Reading = field(default_factory=Reading)
    group: int = 1  # captions per row; missing references become captions without targets
    caption_tokens: int = 1024  # including the stop; longer captions are truncated
    sampled: bool = False  # GRPO: `group` captions of up to `caption_tokens` are sampled; rows have no captions
    aligned: tuple[int, int] = (128, 64)  # clip tokens and caption tokens of a shape are multiples of these
    prompts: tuple[str, ...] = PROMPTS  # one is drawn for a record without a prompt
    habits: Habits = Habits()  # the checkpoint's defaults for prompt settings that a record does not have
    record_seconds: float = 120.0  # timeout for reading and decoding one record
    max_lost_share: float = 0.02  # maximum share of lost rows of this host; the stream fails above it


class _Row(NamedTuple):
    """A row from a worker: clip and captions are padded to the bucket, with a leading axis of 1."""

    clip: Clip
    captions: Captions | None
    weight: float
    truncated: int
    id: str
    record: dict[str, Any]
    reason: str


def row_sizes(index: Index, recipe: Recipe) -> Sizes:
    """The bucket sizes that each record needs, for any of the recipe's prompts and of its captions.

    Sampled captions may have `caption_tokens`, regardless of the length of the record's captions.
    """
    prompts = [record_prompt(recipe.words, {}, text, recipe.habits) for text in recipe.prompts]
    longest = max(len(prompt.before) + len(prompt.after) for prompt in prompts)
    known = sizes(index, longest, recipe.caption_tokens, recipe.config)
    return known._replace(caption=np.full_like(known.caption, recipe.caption_tokens)) if recipe.sampled else known


def plan_batches(
    index: Index, recipe: Recipe, batch: int, shapes: int, seed: int, together: int = 1, spares: int = 0
) -> Plan:
    """Plan the batches of a run: `batch` rows per step over all hosts, at most `shapes` compiled shapes.

    Args:
        together, spares: sizes of a block of batches with the same shape (see `Plan`).

    Raises:
        InputError: the index has no records.
    """
    known = row_sizes(index, recipe)
    buckets = choose_buckets(known, shapes, recipe.group, recipe.config, recipe.aligned) if index.ids else []
    return make_plan(known, buckets, batch, seed, recipe.group, recipe.config, together, spares)


def batches(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    first: int,
    stop: int,
    rows: Sequence[int],
    workers: int = 0,
    threads: int = 2,
) -> Iterator[Batch]:
    """Yield this host's part of the plan's batches `first` to `stop` (exclusive), in order.

    Args:
        rows: this host's rows of the plan's batch, in any order. Repeated rows are read once.
        workers: number of reading and decoding processes; 0: read in this process.
        threads: rows that each process builds concurrently.

    Raises:
        InputError: the share of lost rows of this host exceeds the recipe's maximum.
    """
    distinct = sorted(set(rows))
    places = [distinct.index(row) for row in rows]
    work = _MakeRow(source, plan, recipe, distinct)
    # Send a row as one array. Grain creates one shared-memory block per array, and workers cannot exit while a pipe
    # contains more than block names.
    dataset = grain.MapDataset.range(first * len(distinct), stop * len(distinct)).map(lambda item: _block(work(item)))
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, which only absl's app.run parses
            flags.FLAGS.mark_as_parsed()
        for variable in THREAD_VARIABLES:  # workers inherit these: one core per process
            os.environ.setdefault(variable, "1")
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    iterator = iter(stream)
    lost: list[Lost] = []
    try:
        for step in range(first, stop):
            made = [pickle.loads(next(iterator)) for _ in distinct]
            lost += (missing := [Lost(step, row.id, row.reason) for row in made if row.reason])
            read = (step + 1 - first) * len(distinct)
            if len(lost) > recipe.max_lost_share * max(read, TRIAL):
                examples = "; ".join(f"{record.id}: {record.reason}" for record in lost[:5])
                raise InputError(
                    f"{len(lost)} of {read} records cannot be read: {examples}" + "; ..." * (len(lost) > 5)
                )
            yield _batch([made[index] for index in places], plan, step, missing)
    finally:
        if workers:
            iterator.close()


def _batch(rows: list[_Row], plan: Plan, step: int, lost: list[Lost]) -> Batch:
    at = plan.step(step)
    return Batch(
        step=step,
        epoch=at.epoch,
        bucket=at.bucket,
        ids=tuple(row.id for row in rows),
        records=tuple(row.record for row in rows),
        clip=_concatenate([row.clip for row in rows]),
        captions=None if rows[0].captions is None else _concatenate([row.captions for row in rows]),
        weight=np.array([row.weight for row in rows], np.float32),
        truncated=np.array([row.truncated for row in rows], np.int32),
        padded=at.padded,
        lost=tuple(lost),
    )


def _block(row: _Row) -> Shaped[Array, "N"]:
    return np.frombuffer(pickle.dumps(row, pickle.HIGHEST_PROTOCOL), np.uint8)


def _concatenate(parts: list[Any]) -> Any:
    """Concatenate NamedTuples of arrays along the first axis."""
    return type(parts[0])(*(np.concatenate(leaves) for leaves in zip(*parts)))


class _MakeRow:
    """Builds the row of item i of this host's stream, at step i // rows. Runs in the workers."""

    def __init__(self, source: Source, plan: Plan, recipe: Recipe, rows: Sequence[int]) -> None:
        self.source, self.plan, self.recipe, self.rows = source, plan, recipe, rows

    def __call__(self, item: int) -> _Row:
        _warm()
        step = self.plan.step(item // len(self.rows))
        number = int(step.records[self.rows[item % len(self.rows)]])
        if number < 0:
            return self._without_weight(step.bucket, "", "")
        try:
            return within(
                self.recipe.record_seconds,
                lambda: record_row(self.source[number], number, step.epoch, step.bucket, self.recipe, self.plan.seed),
            )
        except (InputError, StorageError, TimeoutError) as error:
            return self._without_weight(step.bucket, self.source.index.ids[number], str(error))

    def _without_weight(self, bucket: Bucket, name: str, reason: str) -> _Row:
        return _Row(*empty_row(self.recipe, bucket), 0.0, 0, name, {}, reason)


def empty_row(recipe: Recipe, bucket: Bucket) -> tuple[Clip, Captions | None]:
    """A row without content, padded to the bucket: the smallest frame, no sound, no caption.

    The frame keeps all intermediate values finite, so that a weight of 0 removes the row from all sums.
    """
    size = recipe.config.vision.patch * recipe.config.vision.merge
    media = Media(np.zeros((recipe.config.vision.temporal_patch, size, size, 3), np.uint8), None, 0.0)
    row = make_row(media, Prompt([0], [0]), recipe.config, recipe.reading)
    clip = stack([row.clip], bucket.shape)
    return clip, None if recipe.sampled else make_captions([], int(row.clip.first), bucket.caption, recipe.group)[0]


@lru_cache
def _warm() -> None:
    """Compile librosa's functions, which takes seconds, before the first record's timeout starts."""
    log_mel(np.zeros(16_000, np.float32))


def record_row(record: Record, number: int, epoch: int, bucket: Bucket, recipe: Recipe, seed: int) -> _Row:
    """Decode a record, build its prompt, and draw G of its captions in an order given by (seed, epoch, number).

    Raises:
        InputError: the record cannot be decoded, or does not fit the bucket.
    """
    fields = record.fields
    text = draw(recipe.prompts, 1, seed, PROMPT, epoch, number)[0]
    prompt = record_prompt(recipe.words, fields, text, recipe.habits)
    clip = make_row(decoded(record, recipe.reading), prompt, recipe.config, recipe.reading).clip
    if recipe.sampled:
        return _Row(stack([clip], bucket.shape), None, 1.0, 0, fields["id"], fields, "")
    known = list(dict.fromkeys([fields["caption"], *fields.get("references", [])]))
    chosen = draw(known, recipe.group, seed, REFERENCES, epoch, number)
    stop = special_id(recipe.words, "<|im_end|>")
    ids = [[*recipe.words.encode(caption), stop] for caption in chosen]
    captions, truncated = make_captions(ids, int(clip.first), bucket.caption, recipe.group)
    return _Row(stack([clip], bucket.shape), captions, 1.0, truncated, fields["id"], fields, "")


def draw(items: Sequence[str], count: int, seed: int, purpose: int, epoch: int, number: int) -> list[str]:
    """Draw up to `count` of `items` without replacement. The order depends only on the other arguments."""
    order = np.random.default_rng([seed, purpose, epoch, number]).permutation(len(items))
    return [items[index] for index in order[:count]]


def make_captions(ids: list[list[int]], first: int, length: int, group: int) -> tuple[Captions, int]:
    """Pad captions to one row of `group` x `length`; also return the number of truncated ones, which have no stop."""
    targets = np.zeros((1, group, length), np.int32)
    valid = np.zeros((1, group, length), bool)
    for index, caption in enumerate(ids):
        kept = caption[:length]
        targets[0, index, : len(kept)], valid[0, index, : len(kept)] = kept, True
    inputs = np.concatenate([np.full((1, group, 1), first, np.int32), targets[..., :-1]], axis=-1)
    return Captions(inputs, targets, valid), sum(len(caption) > length for caption in ids)
