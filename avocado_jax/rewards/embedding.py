"""Sentence encoder judge: a keypoint is stated if a window of the caption has a similar embedding."""

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
    """Score each keypoint by the largest cosine with any window of one caption, on a ramp from `low` to `high`.

    score_k = clip((max_w <e_w, e_k> - low) / (high - low), 0, 1); a step function if low = high.

    Args:
        embed: (tokens [N S], mask [N S]) -> unit vectors [N D].
        windows: windows of the caption with the encoder's start and end tokens. Windows without a valid token are
            padding; a caption without windows scores 0.
        keypoints: keypoint tokens; keypoints without a valid token are padding.

    Returns:
        fp32 in [0, 1]; NaN for padding.
    """
    near = embed(keypoints, keypoints_valid) @ embed(windows, windows_valid).T
    best = jnp.max(near, axis=1, where=jnp.any(windows_valid, axis=1), initial=-1.0)
    score = jnp.where(best >= high, 1.0, jnp.clip((best - low) / max(high - low, 1e-6), 0.0, 1.0))
    score = jnp.where(best < low, 0.0, score)
    return jnp.where(jnp.any(keypoints_valid, axis=1), score, jnp.nan)
