"""RepCol: detect captions that fall into repetition, on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.typing import Array, Bool, Int

MIN_SPAN = 24  # minimum characters of a repeated stretch: good captions contain "00000" and "mmmmm"
LONGEST_UNIT, LONGEST_SENTENCE = 99, 400  # longest unit, without and with `long_units`


def collapses(
    points: Int[Array, "N"], length: Int[Array, ""], min_span: int = MIN_SPAN, long_units: bool = False
) -> Bool[Array, ""]:
    """Whether a unit of 1-49 code points is repeated five times in a row, or one of 50-99 four times.

    For each unit length, one pass over the text marks the positions that equal the position one unit later, 32 per
    word. Doubling finds the starts of sufficiently long runs.

    Args:
        min_span: minimum code points of the stretch; 0: the cleaning rule of the paper's official evaluation.
        long_units: also detect units of 100-400 code points (sentences) repeated three times.
    """
    longest_unit = LONGEST_SENTENCE if long_units else LONGEST_UNIT
    units = np.arange(1, longest_unit + 1)
    spans = np.maximum(np.where(units < 50, 5, np.where(units < 100, 4, 3)) * units, min_span)
    runs = jnp.asarray(spans - units)  # consecutive equal positions of such a stretch
    longest = int((spans - units).max())
    words = -(-len(points) // 32)
    places = jnp.arange(32 * words)
    here = jnp.pad(points, (0, 32 * words - len(points)))
    ahead = jnp.pad(here, (0, longest_unit))

    def repeats(unit: jax.Array) -> jax.Array:
        later = jax.lax.dynamic_slice_in_dim(ahead, unit, len(here))
        equal = (here == later) & (places + unit < length)
        starts = jnp.sum(
            equal.reshape(words, 32).astype(jnp.uint32) << np.arange(32, dtype=np.uint32)[None], -1, jnp.uint32
        )
        run, have = runs[unit - 1], jnp.int32(1)
        for _ in range(max(1, longest - 1).bit_length()):
            by = jnp.minimum(have, run - have)  # 0 once the run is complete
            starts &= _bits_from(starts, by, longest)
            have += by
        return starts.any()

    return jax.lax.fori_loop(1, longest_unit + 1, lambda unit, found: found | repeats(unit), jnp.array(False))


def _bits_from(words: Int[Array, "W"], by: Int[Array, ""], most: int) -> Int[Array, "W"]:
    """Drop the first `by` (at most `most`) bits of a row and append zeros."""
    padded = jnp.pad(words, (0, most // 32 + 2))
    low, high = (jax.lax.dynamic_slice_in_dim(padded, by // 32 + k, len(words)) for k in (0, 1))
    bit = (by % 32).astype(jnp.uint32)
    return (low >> bit) | jnp.where(bit > 0, high << (32 - bit), 0)
