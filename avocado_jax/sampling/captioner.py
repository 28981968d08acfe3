"""A policy, its tokenizer and a question, ready to caption clips; from parameters in memory too."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.data.media import Media, Reading
from avocado_jax.data.prompt import Habits, Prompt, record_prompt
from avocado_jax.data.records import Record, decoded
from avocado_jax.data.rows import Row, Shape, fit, make_row, rounded, shape_of, stack
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.parallel.batches import ROWS, rows_sharding
from avocado_jax.sampling.generate import Samples, caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.sampling.weights import decoding_weights
from avocado_jax.typing import Array, Bool, Clip, Int

GREEDY = Sampling(0.0)


class Captioner(NamedTuple):
    """Everything that captioning needs."""

    config: ThinkerConfig
    params: Any  # of `config`, on the default device or over a mesh
    tokenizer: Words
    prompt: Prompt  # the question, where a clip brings none of its own
    stops: tuple[int, ...]
    banned: Bool[Array, "V"]
    reading: Reading  # how the model's clips are sampled
    question: str
    habits: Habits

    def row(self, media: Media, fields: Mapping[str, Any] = {}) -> Row:
        """A clip with its prompt: `prompt`, `system` and `media_first` of its manifest fields, else the captioner's."""
        prompt = record_prompt(self.tokenizer, fields, self.question, self.habits)
        return make_row(media, prompt, self.config, self.reading)


def captioner_of(
    config: ThinkerConfig,
    params: Any,
    tokenizer: Words,
    stops: tuple[int, ...],
    text: str,
    reading: Reading = Reading(),
    habits: Habits = Habits(),
) -> Captioner:
    """A captioner of parameters in the layout of `config`.

    Raises:
        InputError: the tokenizer makes ids that the vocabulary does not have.
    """
    prompt = record_prompt(tokenizer, {}, text, habits)
    if (largest := max([*prompt.before, *prompt.after])) >= config.text.vocab:
        raise InputError(f"the tokenizer makes id {largest}, the vocabulary ends at {config.text.vocab}")
    banned = banned_ids(config, tokenizer, stops)
    return Captioner(config, params, tokenizer, prompt, stops, banned, reading, text, habits)


def captioner_in_training(
    config: ThinkerConfig,
    params: Any,
    tokenizer: Words,
    stops: tuple[int, ...],
    text: str,
    dtype: str,
    reading: Reading = Reading(),
    habits: Habits = Habits(),
) -> Captioner:
    """A captioner of a training state's parameters: a copy in `dtype` with separate layers, sharded like them.

    All processes call this, and then `caption_rows` with the same rows.
    """
    weights = decoding_weights(params, dtype, _mesh(params))
    return captioner_of(computed(config, dtype, scan=False), weights, tokenizer, stops, text, reading, habits)


def _mesh(params: Any) -> Mesh | None:
    """The mesh that parameters lie over, if they do."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def banned_ids(config: ThinkerConfig, tokenizer: Words, stops: tuple[int, ...]) -> Bool[Array, "V"]:
    """Ids that a caption can never hold: media placeholders, special tokens, rows that are no token; not the stops."""
    banned = np.ones(config.text.vocab, bool)
    banned[[i for i in tokenizer.known_ids() if i < config.text.vocab]] = False
    ids = config.tokens
    media = [ids.audio, ids.image, ids.video, ids.vision_start, ids.vision_end, ids.audio_start, ids.audio_end]
    banned[[i for i in (*tokenizer.special_ids(), *media) if i < config.text.vocab]] = True
    banned[list(stops)] = False
    return banned


def caption_rows(
    captioner: Captioner,
    rows: Sequence[Row],
    numbers: Int[Array, "B"],
    sampling: Sampling,
    length: int,
    seed: int = 0,
    group: int = 1,
    shape: Shape | None = None,
) -> Samples:
    """Sample `group` captions of each row, all rows in one batch; numpy arrays, the same in every process.

    `numbers` identify the clips: with `seed` they decide what is drawn, whatever else is in the batch.
    `shape` is what rows are padded to, by default one that few batches differ in.
    """
    clips = [row.clip for row in rows]
    samples = _samples(
        captioner.params,
        stack(clips, shape or rounded(fit([shape_of(clip) for clip in clips]))),
        np.uint32(seed),
        np.asarray(numbers, np.int32),
        captioner.banned,
        config=captioner.config,
        sampling=sampling,
        stops=captioner.stops,
        length=length,
        group=group,
        mesh=_mesh(captioner.params),
    )
    return jax.tree.map(np.asarray, samples)


@partial(jax.jit, static_argnames=("config", "sampling", "stops", "length", "group", "mesh"))
def _samples(
    params: Any,
    clip: Clip,
    seed: Array,  # unsigned
    numbers: Int[Array, "B"],
    banned: Bool[Array, "V"],
    *,
    config: ThinkerConfig,
    sampling: Sampling,
    stops: tuple[int, ...],
    length: int,
    group: int,
    mesh: Mesh | None,
) -> Samples:
    """One program from the host's arrays on: under a mesh all processes give the same ones."""
    if mesh:
        ways = math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.shape)
        if len(numbers) % ways == 0:
            clip = jax.lax.with_sharding_constraint(clip, rows_sharding(mesh))
    options = dict(config=config, sampling=sampling, stops=stops, length=length)
    samples = generate(params, clip, caption_keys(jax.random.key(seed), numbers, group), banned, **options)
    return jax.lax.with_sharding_constraint(samples, NamedSharding(mesh, PartitionSpec())) if mesh else samples


def words(captioner: Captioner, tokens: Int[Array, "C"]) -> str:
    """The text of one caption's tokens, without its stop id."""
    return captioner.tokenizer.decode([int(token) for token in tokens if token not in captioner.stops]).strip()


def caption_records(captioner: Captioner, records: Sequence[Record], length: int, batch: int) -> list[str | None]:
    """The likeliest caption of each record's clip, asked the record's own question; None for one that is unreadable.

    All batches have one shape, so one program is compiled as long as the records are the same.
    """
    rows: dict[int, Row] = {}
    for place, record in enumerate(records):
        try:
            media = decoded(record, captioner.reading)
        except InputError:
            continue
        rows[place] = captioner.row(media, record.fields)
    captions: list[str | None] = [None] * len(records)
    if not rows:
        return captions
    shape = rounded(fit([shape_of(row.clip) for row in rows.values()]))
    for first in range(0, len(rows), batch):
        places = list(rows)[first : first + batch]
        filled = [rows[place] for place in places + places[-1:] * (batch - len(places))]
        samples = caption_rows(captioner, filled, np.zeros(batch, np.int32), GREEDY, length, shape=shape)
        for place, tokens, count in zip(places, samples.tokens[:, 0], samples.lengths[:, 0]):
            captions[place] = words(captioner, tokens[:count])
    return captions
