"""Judges of keypoints bound to their models and tokenizers: texts in, scores out.

Every judge is a function `judge(captions, keypoints)` of N captions and the keypoints of each. It starts the work and
returns a function that waits for the scores: fp32 [N, K] in 0..1, NaN where a keypoint has no verdict or there is none.
`rewards.judge.RemoteJudge` is one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from avocado_jax.checkpoint.hf_encoder import read_encoder
from avocado_jax.checkpoint.load import load_params, open_language_model
from avocado_jax.checkpoint.orbax import fetched, run_path
from avocado_jax.data.prompt import chat_prompt
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import computed
from avocado_jax.models.encoder import Encoder
from avocado_jax.models.thinker import Thinker
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.embedding import embedding_scores
from avocado_jax.rewards.judge import RemoteJudge
from avocado_jax.rewards.lm import lm_scores
from avocado_jax.typing import Array, Float, Int

Judge = Callable[[Sequence[str], Sequence[Sequence[str]]], Callable[[], Float[np.ndarray, "N K"]]]

BATCH = 8  # captions at once
# Stretches about as long as a keypoint: a sentence holds several, and its vector is their mean (rewards/README.md).
WINDOW, STRIDE = 16, 8  # tokens of a stretch, and from the start of one to the next
LOW, HIGH = 0.45, 0.75  # cosines from which a keypoint counts, and counts in full

SYSTEM = "You check statements against a description of a video. Go by the description alone."
OPENING = "The description:\n\n"
QUESTION = '\n\nThe statement: "{}"\n\nDoes the description state this, or plainly imply it? Answer yes or no.'
YES, NO = ("Yes", "yes"), ("No", "no")


@contextmanager
def open_judge(name: str, model: str, dtype: str, endpoint: Endpoint | None = None) -> Iterator[Judge]:
    """A judge by its name, "embedding", "lm" or "remote", while the block runs.

    Args:
        model: the folder of the first two, local or gs://.
        dtype: what the language model computes in.
        endpoint: of the last.

    Raises:
        InputError: as each of them.
    """
    if name == "remote":
        with RemoteJudge(endpoint) as judge:
            yield judge
    else:
        yield embedding_judge(fetched(run_path(model))) if name == "embedding" else lm_judge(model, dtype)


def embedding_judge(folder: Path, low: float = LOW, high: float = HIGH) -> Judge:
    """The sentence encoder in a folder of sentence-transformers: cosines of `low` and less score 0, of `high` 1.

    Raises:
        InputError: the folder holds none (`read_encoder`), or its tokenizer is of another vocabulary or does not
            frame a text by two marks.
    """
    config, params = read_encoder(folder)
    pieces = _word_pieces(folder, config.vocab)
    first, last = pieces("", True)

    def framed(ids: list[int]) -> list[int]:
        return [first, *ids[: config.positions - 2], last] if ids else []

    @jax.jit
    def score(params: Any, windows: Array, window_lengths: Array, points: Array, point_lengths: Array) -> Array:
        def embed(tokens: Array, valid: Array) -> Array:
            return Encoder(config).apply({"params": params}, tokens, valid)

        valid = [
            jnp.arange(tokens.shape[2]) < lengths[..., None]
            for tokens, lengths in ((windows, window_lengths), (points, point_lengths))
        ]
        one = partial(embedding_scores, embed, low=low, high=high)
        return jax.vmap(one)(windows, valid[0], points, valid[1])

    def batch(captions: Sequence[str], keypoints: Sequence[Sequence[str]]) -> Array:
        ids = [pieces(caption) for caption in captions]
        windows = [
            [framed(one[start : start + WINDOW]) for start in range(0, max(1, len(one) - STRIDE), STRIDE)]
            for one in ids
        ]
        points = [[framed(pieces(text)) for text in texts] for texts in keypoints]
        return score(params, *_padded(windows), *_padded(points))

    return partial(_judge, batch)


def lm_judge(folder: str | Path, dtype: str) -> Judge:
    """The language model in a folder, a thinker's or a text model's, asked in Qwen's chat format; computes in `dtype`.

    Raises:
        InputError: the folder holds none, or a tokenizer of another vocabulary, or for which yes and no begin alike.
    """
    checkpoint = open_language_model(folder)
    tokenizer = load_words(checkpoint.side_files)
    model = Thinker(computed(checkpoint.config, dtype, scan=False))
    yes, no = ({tokenizer.encode(text)[0] for text in texts} for texts in (YES, NO))
    if (largest := max(tokenizer.known_ids())) >= checkpoint.config.text.vocab:
        raise InputError(
            f"{folder}: the tokenizer makes id {largest}, the vocabulary ends at {model.config.text.vocab}"
        )
    if yes & no:
        raise InputError(f"{folder}: yes and no begin with the same token")
    answers = [np.array(sorted(ids)) for ids in (yes, no)]
    params = load_params(checkpoint, dtype)
    score = jax.jit(partial(lm_scores, model.apply))

    def batch(captions: Sequence[str], keypoints: Sequence[Sequence[str]]) -> Array:
        before = [*chat_prompt(tokenizer, "", SYSTEM).before, *tokenizer.encode(OPENING)]
        read = [[[*before, *tokenizer.encode(caption)]] for caption in captions]
        asked = [[chat_prompt(tokenizer, QUESTION.format(text), SYSTEM).after for text in texts] for texts in keypoints]
        tokens, lengths = (part[:, 0] for part in _padded(read, slots=1, each=128))
        return score(params, tokens, np.maximum(1, lengths), *_padded(asked), *answers)

    return partial(_judge, batch)


def _judge(
    batch: Callable[[Sequence[str], Sequence[Sequence[str]]], Array],
    captions: Sequence[str],
    keypoints: Sequence[Sequence[str]],
) -> Callable[[], Float[np.ndarray, "N K"]]:
    """Send batches to the device, one after another; the scores are waited for when they are asked for."""
    captions = [_sound(caption) for caption in captions]
    keypoints = [[_sound(text) for text in texts] for texts in keypoints]
    starts = range(0, len(captions), BATCH)
    parts = [batch(captions[start : start + BATCH], keypoints[start : start + BATCH]) for start in starts]

    def collect() -> Float[np.ndarray, "N K"]:
        scores = np.full((len(captions), max(map(len, keypoints), default=0)), np.nan, np.float32)
        for start, part in zip(starts, parts):
            block = scores[start : start + BATCH]
            found = np.asarray(part)[: len(block), : block.shape[1]]
            block[:, : found.shape[1]] = found
        return scores

    return collect


def _sound(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can hold and tokenizers refuse."""
    return text.encode(errors="replace").decode()


def _padded(
    texts: Sequence[Sequence[Sequence[int]]], slots: int = 8, each: int = 16
) -> tuple[Int[np.ndarray, "B N S"], Int[np.ndarray, "B N"]]:
    """Lists of ids as one array and the length of each, in multiples of `slots` lists and `each` ids."""
    count = max(map(len, texts), default=0)
    size = max((len(ids) for row in texts for ids in row), default=0)
    tokens = np.zeros((BATCH, max(1, -(-count // slots)) * slots, max(1, -(-size // each)) * each), np.int32)
    lengths = np.zeros(tokens.shape[:2], np.int32)
    for i, row in enumerate(texts):
        for j, ids in enumerate(row):
            tokens[i, j, : len(ids)] = ids
            lengths[i, j] = len(ids)
    return tokens, lengths


def _word_pieces(folder: Path, vocab: int) -> Callable[..., list[int]]:
    """Texts to the ids of an encoder's tokenizer, with its two marks if `marks`; nothing is cut or padded."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # spelled out in a text they stay text

    def pieces(text: str, marks: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=marks).ids

    if tokenizer.get_vocab_size() > vocab:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the vocabulary {vocab}")
    if len(pieces("", True)) != 2:
        raise InputError(f"{folder}: the tokenizer does not frame a text by two marks")
    return pieces
