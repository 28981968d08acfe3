"""What a judge that needs a model says of real captions: FILE is a list of {"conversations", "events"}.

  python tests/measure_judges.py video_salmonn2.json --encoder DIR [--clips N]    # a sentence encoder
  python tests/measure_judges.py video_salmonn2.json --lm DIR [--clips N]         # a language model

Each caption is scored against its own events and another clip's, cut to its first half, with opposites in place of
colours and sides, as a bag of its words, and with its sentences in random order.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np

from avocado_jax.train.judges import LmJudge, embedding_judge

OPPOSITES = (
    ("red", "green"),
    ("blue", "yellow"),
    ("black", "white"),
    ("left", "right"),
    ("man", "woman"),
    ("top", "bottom"),
    ("loud", "quiet"),
    ("up", "down"),
)


def swapped(text):
    """The text with each word of a pair in place of the other."""
    other = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
    return re.sub(r"\b[a-z]+\b", lambda found: other.get(found[0], found[0]), text)


def area(positive, negative):
    """The probability that one of the first ranks above one of the second, ties half."""
    negative = np.sort(negative)
    below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negative))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    judge = embedding_judge(args.encoder) if args.encoder else LmJudge(args.lm, "float32")
    records = json.loads(args.file.read_text())[: args.clips]
    captions = [record["conversations"][1]["value"] for record in records]
    events = [record["events"] for record in records]
    start = time.monotonic()
    own = judge(captions, events)()
    print(
        f"{len(captions)} captions, {sum(map(len, events))} events: {time.monotonic() - start:.1f} s with compilation"
    )
    print(f"own: R_C {np.nanmean(own, axis=1).mean():.3f}, least {np.nanmean(own, axis=1).min():.3f}")
    other = judge(captions[7:] + captions[:7], events)()
    of = [scores[~np.isnan(scores)] for scores in (own, other)]
    print(f"another clip's: R_C {np.nanmean(other, axis=1).mean():.3f}; AUC {area(*of):.4f}")
    halves = [" ".join((words := caption.split())[: len(words) // 2]) for caption in captions]
    half = judge(halves, events)()
    first = np.concatenate([row[: int(0.4 * len(one))] for row, one in zip(half, events)])
    last = np.concatenate([row[len(one) - int(0.4 * len(one)) : len(one)] for row, one in zip(half, events)])
    print(f"first half kept: first 40% of the events against the last 40% at AUC {area(first, last):.4f}")
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(words := caption.split(), len(words))) for caption in captions]
    sentences = [re.split(r"(?<=[.!?])\s+", caption) for caption in captions]
    reordered = [" ".join(rng.sample(parts, len(parts))) for parts in sentences]
    for name, changed in (
        ("opposites", [swapped(caption) for caption in captions]),
        ("bag of words", shuffled),
        ("sentences in random order", reordered),
    ):
        scores = np.nanmean(judge(changed, events)(), axis=1)
        lower = np.mean(scores < np.nanmean(own, axis=1))
        print(f"{name}: R_C {scores.mean():.3f}, below the honest caption in {lower:.0%}")


if __name__ == "__main__":
    main()
