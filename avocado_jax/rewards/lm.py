"""The language model as a judge: it reads a caption once and answers yes or no for each keypoint that hangs off it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array, Captions, Clip, Float, Int


def lm_scores(
    apply: Callable[..., Any],
    params: Any,
    captions: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    questions: Int[Array, "B K Q"],
    question_lengths: Int[Array, "B K"],
    yes: Int[Array, "Y"],
    no: Int[Array, "N"],
) -> Float[Array, "B K"]:
    """P(yes) / (P(yes) + P(no)) of the token after each question, in the layout of a clip and its captions.

    Questions see their caption and themselves, and take up its positions where it ends, so that the score is that
    of the plain sequence [caption, question]: at 40 questions of 40 tokens after a caption of 1,000, a sixteenth of
    the work.

    Args:
        apply: of a thinker, or of a language model as a thinker without towers: `apply({"params": params}, clip,
            captions)` gives hidden states and `method="logits"` scores of ids.
        captions: B captions, the prompt before them included, right-padded.
        lengths: valid tokens of each, at least 1.
        questions: what follows a caption, one for each of its K keypoints, right-padded: the statement, the
            question, the opening of the answer.
        question_lengths: 0 where there is no keypoint.
        yes, no: the ids with which each answer may begin.

    Returns:
        fp32 in 0..1; NaN where there is no keypoint.
    """
    inputs = Captions(questions, questions, jnp.ones(questions.shape, bool))
    hidden = apply({"params": params}, _text(captions, lengths), inputs)
    last = jnp.maximum(0, question_lengths - 1)[..., None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=2)[:, :, 0]
    scores = apply({"params": params}, hidden, jnp.concatenate([yes, no]), method="logits")
    odds = jax.nn.logsumexp(scores[..., : len(yes)], axis=-1) - jax.nn.logsumexp(scores[..., len(yes) :], axis=-1)
    return jnp.where(question_lengths > 0, jax.nn.sigmoid(odds), jnp.nan)


def _text(tokens: Int[Array, "B P"], lengths: Int[Array, "B"]) -> Clip:
    """Texts as clips without picture and sound; what hangs off them starts at the position where they end."""
    rows, length = tokens.shape
    return Clip(
        tokens=tokens,
        positions=jnp.broadcast_to(jnp.arange(length)[:, None], (rows, length, 3)),
        length=lengths,
        media=jnp.full((rows, length), -1),
        first=jnp.zeros(rows, jnp.int32),  # of captions that are decoded: none are
        start=lengths,
        patches=jnp.zeros((rows, 0, 0, 0, 0), jnp.uint8),
        patch_grid=jnp.zeros((rows, 0, 0, 2), jnp.int32),
        patch_valid=jnp.zeros((rows, 0, 0), bool),
        mel=jnp.zeros((rows, 0, 0, 0)),
        mel_length=jnp.zeros((rows, 0), jnp.int32),
    )
