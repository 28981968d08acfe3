"""The sentence encoder as a judge: a keypoint is stated if some stretch of the caption means nearly the same."""

from collections.abc import Callable

import jax.numpy as jnp

from avocado_jax.typing import Array, Bool, Float, Int


def embedding_scores(
    embed: Callable[[Array, Array], Array],
    windows: Int[Array, "W S"],
    windows_valid: Bool[Array, "W S"],
    keypoints: Int[Array, "K Q"],
    keypoints_valid: Bool[Array, "K Q"],
    low: float,
    high: float,
) -> Float[Array, "K"]:
    """The largest cosine between each keypoint and any window of one caption, on a ramp from `low` to `high`.

    score_k = clip((max_w <e_w, e_k> - low) / (high - low), 0, 1); with low = high, whether the cosine reaches it.

    Args:
        embed: tokens and which of them are valid to unit vectors, [N S] -> [N D].
        windows: stretches of the caption, with the encoder's marks of begin and end. One without a valid token is
            none; a caption without any states nothing.
        keypoints: one without a valid token is none.

    Returns:
        fp32 in 0..1; NaN where there is no keypoint.
    """
    near = embed(keypoints, keypoints_valid) @ embed(windows, windows_valid).T
    best = jnp.max(near, axis=1, where=jnp.any(windows_valid, axis=1), initial=-1.0)
    score = jnp.where(best >= high, 1.0, jnp.clip((best - low) / max(high - low, 1e-6), 0.0, 1.0))
    score = jnp.where(best < low, 0.0, score)
    return jnp.where(jnp.any(keypoints_valid, axis=1), score, jnp.nan)
