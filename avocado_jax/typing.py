"""Axis letters, array aliases and the batch containers that data produces and models consume.

    B  rows, one clip each                 V  vocabulary
    G  captions of a clip                  D  width of the language model
    P  clip tokens (the prompt)            H  query heads, K  key/value heads
    C  caption tokens                      E  width of one head
    T  temporal patches of a clip          R  query heads per key/value head
    W  windows of one temporal patch       A  audio chunks of 200 mel frames
    U  slots of a window (64 patches)      L  layers
    X  values per patch (1176)             M  mel bins
    Q, S  queries and keys of an attention

This module does not import jax, so that input workers can import it.
"""

from typing import Any, NamedTuple

Array = Any  # a jax.Array on devices, a numpy.ndarray on hosts

try:  # shapes are checked at run time in tests only; without jaxtyping the annotations have no effect
    from jaxtyping import Bool, Float, Int, Shaped
except ImportError:

    class _Inert:
        def __class_getitem__(cls, _: object) -> Any:
            return Any

    Bool = Float = Int = Shaped = _Inert

__all__ = ["Array", "Bool", "Captions", "Clip", "Float", "Int", "Probe", "Shaped"]


class Clip(NamedTuple):
    """The inputs of the model for B clips: prompt ids, pictures, sound, and how they interleave.

    Patches are in window order: each temporal patch has W windows of U slots; empty slots of edge windows are masked.
    The last prompt token is not part of the clip. It is the first caption input (`first`), so that logits are computed
    at caption positions only.
    """

    tokens: Int[Array, "B P"]  # prompt ids with media placeholders, right-padded
    positions: Int[Array, "B P 3"]  # TMRoPE ids: time, height, width
    length: Int[Array, "B"]  # valid prompt tokens
    media: Int[Array, "B P"]  # media embedding that replaces the token: [T*W*U/4 visual | A*50 audio], or -1
    first: Int[Array, "B"]  # first input of every caption: the last prompt token
    start: Int[Array, "B"]  # its position, on all three axes
    patches: Shaped[Array, "B T W U X"]  # uint8 pixels in window order
    patch_grid: Int[Array, "B W U 2"]  # row and column of each patch in its frame
    patch_valid: Bool[Array, "B W U"]  # slots with a patch
    mel: Float[Array, "B A 200 M"]  # log-mel frames in chunks, zero-padded
    mel_length: Int[Array, "B A"]  # valid frames of each chunk


class Captions(NamedTuple):
    """G captions for each of B clips, for teacher forcing: `targets[c]` follows `inputs[c]`."""

    inputs: Int[Array, "B G C"]
    targets: Int[Array, "B G C"]
    valid: Bool[Array, "B G C"]  # loss mask


class Probe(NamedTuple):
    """A multiple-choice question about a clip."""

    question: str
    choices: tuple[str, ...]
    right: int  # index of the correct choice
    category: str = ""
