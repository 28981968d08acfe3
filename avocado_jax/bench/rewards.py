"""Benchmark the rewards of a batch of captions, as they run on the training devices."""

import json
from typing import Any

import jax
import numpy as np

from avocado_jax.bench.measure import row, seconds_of
from avocado_jax.rewards.checklist import BLOCK
from avocado_jax.rewards.combine import make_references, score_captions
from avocado_jax.rewards.text import limits_for
from avocado_jax.rewards.vocabulary import make_table

LINES, POINTS = 12, 40  # lines of dialogue and keypoints per clip
VOCABULARY = 4096


def bench_rewards(captions: int, group: int, caption_tokens: int) -> dict[str, Any]:
    """Compute R_D, R_L, RepCol and the lexical R_C of `captions` captions, `group` per clip, with 12 lines each."""
    random = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(alphabet, random.integers(2, 10))) for _ in range(VOCABULARY)]
    vocab = {"Ġ" + word: number for number, word in enumerate(dict.fromkeys(["the", *words]))}
    verb, opening, first, closing, stop = range(len(vocab), len(vocab) + 5)
    vocab |= {"Ġsays": verb, 'Ġ"': opening, "well": first, '"': closing, ".": stop}
    table = make_table(json.dumps({"model": {"type": "BPE", "vocab": vocab}, "decoder": {"type": "ByteLevel"}}))
    clips = max(1, captions // group)
    ids = random.integers(0, verb, (clips, group, caption_tokens))
    ids[..., ::3] = 0  # about the frequency of function words
    ids[..., 13::13] = stop
    quoted = caption_tokens // (2 * LINES)
    places = 1 + np.arange(LINES) * 2 * quoted
    ids[..., places - 1], ids[..., places], ids[..., places + 1] = verb, opening, first
    ids[..., places + quoted - 1] = closing
    names = [token.removeprefix("Ġ") for token in vocab]

    def join_words(tokens: np.ndarray) -> str:
        return " ".join(names[token] for token in tokens)

    known = [  # lines and keypoints are parts of the first caption of each clip, so that many words align
        {
            "dialogues": [
                {
                    "speaker": join_words(caption[max(at - 4, 0) : at]),
                    "text": join_words(caption[at + 1 : at + quoted - 1]),
                }
                for at in places
            ],
            "keypoints": [
                {"text": join_words(caption[at : at + 9])}
                for at in np.linspace(0, caption_tokens - 9, POINTS, dtype=int)
            ],
        }
        for caption in ids[:, 0]
    ]
    limits = limits_for(caption_tokens)
    references, _ = make_references(table, known, limits._replace(quotes=LINES))
    lengths = np.full((clips, group), caption_tokens)
    score = jax.jit(score_captions)
    placed = jax.device_put((table, ids.astype(np.int32), lengths, references))
    seconds = seconds_of(lambda: score(*placed))
    terms = score(*placed)
    if float(terms["checklist"][:, 0].mean()) < 0.5 or float(terms["dialogue"][:, 0].mean()) < 0.5:
        raise FloatingPointError("a caption does not score against its own parts")
    distinct = references.keypoints.features.shape[-1]
    blocks = -(-limits.words // BLOCK)
    flops = 2 * 2.0 * clips * group * blocks * distinct * POINTS  # the lexical judge: words stated, words of each block
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    return row("rewards", f"{clips * group} captions", seconds, 1, ids.size, flops, nbytes, "float32")
