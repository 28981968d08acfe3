"""Rewards of real captions with gold events: FILE is a list of {"conversations", "events"}.

  python tests/measure_rewards.py video_salmonn2.json

The file is that of the video-SALMONN-2 test set; captions and events are the references, and captions of other clips,
halves of captions, loops and tricks (tricks.py) are scored against them. `rewards/labelled_quotes.json` has the lines
that a reader found in 30 records of its first 240: places in the captions, alternatives of a line, and quotes that
may be taken either way.
"""

import json
import sys
import unicodedata
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "rewards"))

import jax
import numpy as np
import reading
import tricks
from rapidfuzz.distance import Levenshtein

from avocado_jax.rewards import checklist, dialogue, repetition, text, vocabulary
from avocado_jax.rewards.text import Limits

LIMITS = Limits(8192, 1536, 48, 512)
TRICKS = {
    "one or the other": tricks.hedged,
    "lists of alternatives": tricks.listed,
    "all of it is false": tricks.denied,
    "opposites": tricks.contradicted,
    "all speakers in each attribution": tricks.by_everybody,
    "a man everywhere": tricks.by_anybody,
}
SPEECH = ("all speakers in each attribution", "a man everywhere")  # of captions with lines
LABELS = Path(__file__).parent / "rewards" / "labelled_quotes.json"
CHUNK = 40


def in_chunks(of, *trees):
    """A vmapped function over chunks of the leading axis, so that memory stays small."""
    run = jax.jit(jax.vmap(of))
    count = len(jax.tree.leaves(trees)[0])
    slices = [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]
    parts = [run(*jax.tree.map(lambda leaf, part=part: leaf[part], trees)) for part in slices]
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts)


def nearly_contains(line, text):
    """Whether a normalised line nearly equals part of a text."""
    text = reading.normalize(text)
    return bool(text) and 1 - Levenshtein.distance(line, text) / max(len(line), len(text)) >= 0.9


def auc(positive, negative):
    """AUC: the probability that a positive ranks above a negative; ties count half."""
    below = np.searchsorted(np.sort(negative), positive, "left")
    upto = np.searchsorted(np.sort(negative), positive, "right")
    return float((below + upto).mean() / 2 / len(negative))


def main(path):
    """Measure and print."""
    records = json.loads(Path(path).read_text())
    captions = [unicodedata.normalize("NFC", record["conversations"][1]["value"]) for record in records]
    events = [record["events"] for record in records]
    n = len(captions)
    table = vocabulary.make_table(None, vocabulary.word_weights(captions))
    read = partial(text.read_texts, table, limits=LIMITS)
    whole = read(captions)
    print(f"{n} captions, {sum(map(len, events))} events; truncated {int(whole.truncated.sum())}")

    # Quotes: the device against the parser in plain Python.
    found = expected = right = 0
    for clip, caption in enumerate(captions):
        spans = zip(whole.quote_start[clip][: whole.quotes[clip]], whole.quote_end[clip])
        quoted, truth = [caption[a:b] for a, b in spans], reading.quotes(caption)
        found, expected = found + len(quoted), expected + len(truth)
        right += sum(min(quoted.count(one), truth.count(one)) for one in set(quoted))
    print(f"quotes: {expected}, precision {right / found:.4f}, recall {right / expected:.4f}")

    labels = {int(k): one for k, one in json.loads(LABELS.read_text()).items()} if n >= 240 else {}
    true = extra = missed = 0
    for clip, label in labels.items():
        caption = captions[clip]
        spoken = whole.lines[clip][: whole.quotes[clip]], whole.line_length[clip]
        got = ["".join(map(chr, row[:size])) for row, size in zip(*spoken)]
        for spans in label["lines"]:
            match = next((one for one in got if any(nearly_contains(one, caption[a:b]) for a, b in spans)), None)
            missed += match is None
            true += match is not None
            got = got if match is None else [one for k, one in enumerate(got) if k != got.index(match)]
        either = [caption[a:b] for spans in label["either"] for a, b in spans]
        extra += sum(not any(nearly_contains(one, text) for text in either) for one in got)
    if labels:
        print(
            f"lines labelled in 30 records: recall {true / (true + missed):.4f}, precision {true / (true + extra):.4f}"
        )

    lines, truncated = dialogue.dialogue_references(table, [None] * n, captions, LIMITS)
    self_dialogue = in_chunks(dialogue.dialogue_reward, whole, lines)
    speak = whole.quotes > 0
    print(
        f"R_D of a caption against itself: least {self_dialogue.min():.6f}; references truncated {int(truncated.sum())}"
    )
    others = [in_chunks(dialogue.dialogue_reward, captions_of_other_clips(whole, by), lines) for by in (1, 37, 101)]
    both = [speak & np.roll(speak, by) for by in (1, 37, 101)]
    mean = np.mean(np.concatenate([one[use] for one, use in zip(others, both)]))
    every = np.mean(np.concatenate(others))
    print(f"R_D against another clip's: {mean:.4f} where both have lines, {every:.4f} over all pairs (1: none has)")

    points, truncated = checklist.keypoint_references(
        table, [[{"text": event} for event in one] for one in events], captions, LIMITS, max(map(len, events))
    )
    print(f"keypoints: references truncated {int(truncated.sum())}")
    verdict = in_chunks(checklist.lexical, whole, points)
    means = partial(in_chunks, checklist.mean_score)
    self_score = means(verdict.score, points.count)
    print(f"R_C of a caption against its own events: mean {self_score.mean():.4f}, least {self_score.min():.4f}")
    other = np.concatenate(
        [
            means(in_chunks(checklist.lexical, captions_of_other_clips(whole, by), points).score, points.count)
            for by in (1, 37, 101)
        ]
    )
    print(f"R_C against another clip's: mean {other.mean():.4f}, highest {other.max():.4f}")

    half = read([caption[: len(caption) // 2] for caption in captions])
    halves = in_chunks(checklist.lexical, half, points)
    rank = [(np.arange(len(one)) + 0.5) / len(one) for one in events]
    for name in ("coverage", "score"):
        values = [getattr(halves, name)[clip, : len(one)] for clip, one in enumerate(events)]
        first, last = ([v[pick(r)] for v, r in zip(values, rank)] for pick in (early_events, late_events))
        pooled = auc(np.concatenate(first), np.concatenate(last))
        clips = np.mean([auc(a, b) for a, b in zip(first, last)])
        print(
            f"half the caption kept, first 40% of events above last 40%, by {name}: {pooled:.4f}, by clip {clips:.4f}"
        )

    collapsed = in_chunks(repetition.collapses, whole.points, whole.length)
    print(f"references that collapse: {int(collapsed.sum())} of {n}")
    loops = []
    for number, caption in enumerate(captions):
        unit = 1 + number % 99
        begin = number * 7 % max(1, len(caption) - unit)
        loops.append(caption[:300] + caption[begin : begin + unit] * max(5, -(-24 // unit)))
    looping = read(loops)
    collapsed = in_chunks(repetition.collapses, looping.points, looping.length)
    print(f"loops that collapse: {int(collapsed.sum())} of {n}")

    # Tricks: each caption against itself and its events, and changed to be rewarded for what it is not.
    spoken = partial(in_chunks, dialogue.dialogue_reward)
    many = whole.quotes > 0
    for name, trick in TRICKS.items():
        texts = [trick(caption)[: LIMITS.characters] for caption in captions]
        changed = read(texts)
        content = means(in_chunks(checklist.lexical, changed, points).score, points.count)
        both = content + spoken(changed, lines)
        honest = self_score + self_dialogue
        use = many if name in SPEECH else np.ones(n, bool)
        use = use & np.array([text != caption for text, caption in zip(texts, captions)])
        print(
            f"{name}: R_C {content.mean():.3f} of {self_score.mean():.3f}, R_D {(both - content)[use].mean():.3f};"
            f" honest caption ahead in {np.mean(both[use] < honest[use] - 1e-6):.1%}, behind in"
            f" {np.mean(both[use] > honest[use] + 1e-6):.1%} of {use.sum()}"
        )
    looping = read([tricks.looped(caption[:4000]) for caption in captions])
    collapsed = in_chunks(partial(repetition.collapses, long_units=True), looping.points, looping.length)
    kept = in_chunks(partial(repetition.collapses, long_units=True), whole.points, whole.length)
    print(
        f"a sentence again and again: {int(collapsed.sum())} of {n} collapse with long units, {int(kept.sum())} honest"
    )


def captions_of_other_clips(caption, by):
    """Captions of other clips."""
    return jax.tree.map(lambda leaf: np.roll(leaf, by, axis=0), caption)


def early_events(rank):
    """The first 40% of the events."""
    return rank < 0.4


def late_events(rank):
    """The last 40%."""
    return rank > 0.6


if __name__ == "__main__":
    main(*sys.argv[1:])
