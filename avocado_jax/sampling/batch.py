"""Caption a batch that is already on the mesh greedily, for the held-out clips of a training run.

Uses the programs of the engine. All clips of a batch are admitted together, and slots are not refilled.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.logits import GREEDY
from avocado_jax.sampling.slots import Slots
from avocado_jax.typing import Array, Bool, Clip, Float


class Captioning(NamedTuple):
    """Settings of `caption_batch`.

    Attributes:
        config: model config of the parameters, with separate layers.
        mesh: mesh of the parameters: the devices of the clips in the same order.
        length: maximum number of tokens of a caption.
        parts: number of sequential prefills of a batch; row r belongs to part r % parts.
    """

    config: ThinkerConfig
    mesh: Mesh
    stops: tuple[int, ...]
    length: int
    parts: int


def caption_batch(
    params: Any,
    clips: Clip,
    weight: Float[Array, "B"],
    encode: Callable[[Clip], Encoded] | None,
    banned: Bool[Array, "V"],
    settings: Captioning,
) -> Slots:
    """Caption all rows with positive weight. Slot b contains the caption of row b; other slots are empty.

    All processes must call this in `jax.set_mesh` of the mesh of the clips.

    Args:
        clips: clips sharded by rows over their mesh.
        encode: runs the encoders on the clips of a part; None: `params` include the encoders.
    """
    rows, tokens = clips.tokens.shape
    options = settings.config, settings.mesh
    counted = jax.device_get(_replicate(settings.mesh)(weight)) > 0
    slots = programs.empty(*options, tokens, rows, settings.length)
    per_shard = rows // _shards(settings.mesh)
    for part in range(settings.parts):
        some = _part(clips.tokens.sharding.mesh, settings.parts)(clips, np.int32(part))
        taken = np.arange(part, rows, settings.parts, dtype=np.int32)
        index = np.where(counted[taken], taken % per_shard, per_shard).astype(np.int32)  # past the last: not inserted
        index = index.reshape(rows // per_shard, -1)
        encoded = encode and encode(some)
        slots = programs.admit(slots, params, some, encoded, np.uint32(0), np.zeros_like(taken), index, *options)
    finished = not counted.any()
    while not finished:
        slots = programs.advance(slots, params, banned, *options, GREEDY, settings.stops, settings.length)
        finished = jax.device_get(slots.stopped).all()
    return slots


def batch_programs(
    params: Any, clips: Clip, weight: Any, encoded: Any, banned: Any, settings: Captioning
) -> list[Program]:
    """The programs of `caption_batch`. The arguments are shapes with shardings.

    Args:
        encoded: encoder outputs of a part; None if `params` include the encoders.
    """
    rows, tokens = clips.tokens.shape
    options, many = (settings.config, settings.mesh), rows // settings.parts
    slots = programs.slot_shapes(*options, tokens, rows, settings.length)
    take = _part(clips.tokens.sharding.mesh, settings.parts)
    by_row = rows_sharding(clips.tokens.sharding.mesh)
    some = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_row),
        jax.eval_shape(partial(take, part=np.int32(0)), clips),
    )
    shards = _shards(settings.mesh)
    seed, number = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.uint32, jnp.int32))
    numbers, index = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((many,), (shards, many // shards)))
    return [
        Program("held-out weights", _replicate(settings.mesh), (weight,)),
        Program("held-out slots", programs.empty, (*options, tokens, rows, settings.length)),
        Program("a part of the held-out clips", take, (clips, number)),
        Program("held-out prefill", programs.admit, (slots, params, some, encoded, seed, numbers, index, *options)),
        Program(
            "held-out decoding",
            programs.advance,
            (slots, params, banned, *options, GREEDY, settings.stops, settings.length),
        ),
    ]


@cache
def _part(mesh: Mesh, parts: int) -> Callable[..., Clip]:
    """Jitted (clips, part) -> clips of the part. Each device selects from its own rows."""

    def take(clips: Clip, part: Any) -> Clip:
        def select(leaf: Any) -> Any:
            divided = leaf.reshape(len(leaf) // parts, parts, *leaf.shape[1:])
            return jax.lax.dynamic_index_in_dim(divided, part, axis=1, keepdims=False)

        return jax.tree.map(select, clips)

    return jax.jit(take, out_shardings=rows_sharding(mesh))


def _shards(mesh: Mesh) -> int:
    """Shards of rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


@cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
