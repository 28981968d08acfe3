"""Greedy captions of a batch that is on the mesh already, as the held-out clips of a training run are.

The programs are those of the engine. All clips of a batch enter their slots at once; none is refilled.
"""

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
from avocado_jax.parallel.mesh import parts_of
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.logits import GREEDY
from avocado_jax.sampling.slots import Slots
from avocado_jax.typing import Array, Bool, Clip, Float


class Captioning(NamedTuple):
    """How batches are captioned.

    Attributes:
        config: of the parameters; separate layers.
        length: maximum number of tokens of a caption.
        parts: sequential parts that a batch is prefilled in; row r belongs to part r % parts.
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
    how: Captioning,
) -> Slots:
    """Caption all rows with a positive weight; slot b has the caption of row b, and others have none.

    All processes call this in `jax.set_mesh`.

    Args:
        clips: sharded by rows.
        encode: runs the encoders on the clips of a part; None: `params` include them.
    """
    rows, tokens = clips.tokens.shape
    options = how.config, how.mesh
    counted = jax.device_get(_replicate(how.mesh)(weight)) > 0
    slots = programs.empty(*options, tokens, rows, how.length)
    per_shard = rows // parts_of("rows")
    for part in range(how.parts):
        some = _part(how.mesh, how.parts)(clips, np.int32(part))
        taken = np.arange(part, rows, how.parts, dtype=np.int32)
        index = np.where(counted[taken], taken % per_shard, per_shard).astype(np.int32)  # past the last: not inserted
        index = index.reshape(rows // per_shard, -1)
        encoded = encode and encode(some)
        slots = programs.admit(slots, params, some, encoded, np.uint32(0), np.zeros_like(taken), index, *options)
    finished = not counted.any()
    while not finished:
        slots = programs.advance(slots, params, banned, *options, GREEDY, how.stops, how.length)
        finished = jax.device_get(slots.stopped).all()
    return slots


def batch_programs(params: Any, clips: Clip, weight: Any, encoded: Any, banned: Any, how: Captioning) -> list[Program]:
    """The programs of `caption_batch`, whose arguments are given as shapes with shardings.

    Args:
        encoded: of a part; None if `params` include the encoders.
    """
    rows, tokens = clips.tokens.shape
    options, many = (how.config, how.mesh), rows // how.parts
    slots = programs.slot_shapes(*options, tokens, rows, how.length)
    by_row = rows_sharding(how.mesh)
    some = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_row),
        jax.eval_shape(partial(_part(how.mesh, how.parts), part=np.int32(0)), clips),
    )
    shards = parts_of("rows")
    seed, number = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.uint32, jnp.int32))
    numbers, index = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((many,), (shards, many // shards)))
    return [
        Program("held-out weights", _replicate(how.mesh), (weight,)),
        Program("held-out slots", programs.empty, (*options, tokens, rows, how.length)),
        Program("a part of the held-out clips", _part(how.mesh, how.parts), (clips, number)),
        Program("held-out prefill", programs.admit, (slots, params, some, encoded, seed, numbers, index, *options)),
        Program(
            "held-out decoding", programs.advance, (slots, params, banned, *options, GREEDY, how.stops, how.length)
        ),
    ]


@cache
def _part(mesh: Mesh, parts: int) -> Callable[..., Clip]:
    """Jitted (clips, part) -> the clips of a part. Each device takes them from its own rows."""

    def take(clips: Clip, part: Any) -> Clip:
        def of(leaf: Any) -> Any:
            divided = leaf.reshape(len(leaf) // parts, parts, *leaf.shape[1:])
            return jax.lax.dynamic_index_in_dim(divided, part, axis=1, keepdims=False)

        return jax.tree.map(of, clips)

    return jax.jit(take, out_shardings=rows_sharding(mesh))


@cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
