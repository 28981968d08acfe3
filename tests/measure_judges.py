"""Scores of a judge of keypoints on real captions: FILE is a list of {"conversations", "events"}.

  python tests/measure_judges.py video_salmonn2.json                                   # lexical
  python tests/measure_judges.py video_salmonn2.json --judge embedding --judge-model DIR
  python tests/measure_judges.py video_salmonn2.json --judge lm --judge-model REF      # any checkpoint
  python tests/measure_judges.py FILE --judge remote --judge-url https://HOST/v1 --judge-model NAME

Each caption is judged against its own events: as it is; its first half (against all events, and against the last 40%);
another clip's caption; with opposites in place of colours, sides and sexes ("contradiction"); with both ("hedge"); and
with all speakers in each attribution ("union"). `--paraphrases` names a JSON object of record numbers and captions of
the same clips in other words. The table is that of avocado_jax/rewards/README.md.
"""

import argparse
import json
import time
import unicodedata
from pathlib import Path

import numpy as np
import tricks

from avocado_jax.eval.rewarded import scores
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.checklist import HIGH, LOW
from avocado_jax.rewards.combine import DEFAULTS, JUDGES
from avocado_jax.rewards.vocabulary import make_table, word_weights, words_of
from avocado_jax.train.judges import open_judge

VARIANTS = {
    "own": lambda caption: caption,
    "half": tricks.half,
    "contradiction": tricks.contradicted,
    "hedge": tricks.hedged,
    "union": tricks.by_everybody,
}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--judge", choices=(*JUDGES, "combined"), default="lexical")
    parser.add_argument("--judge-model", default="")
    parser.add_argument("--judge-url", default="")
    parser.add_argument("--paraphrases", type=Path)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--ramp", type=float, nargs=2, default=(LOW, HIGH), help="of the lexical judge")
    parser.add_argument("--idf", action="store_true", help="word weights from the captions of FILE")
    args = parser.parse_args()
    records = json.loads(args.file.read_text())
    captions = [unicodedata.normalize("NFC", record["conversations"][1]["value"]) for record in records]
    events = [record["events"] for record in records]
    judge = opened(args, captions, events)
    if args.paraphrases:
        paraphrases = {int(number): text for number, text in json.loads(args.paraphrases.read_text()).items()}
        shared = [overlap(text, captions[number]) for number, text in paraphrases.items()]
        print(f"{len(paraphrases)} paraphrases: {np.mean(shared):.1%} of runs of 4 words are in the reference caption")
        show("paraphrase", judge([*paraphrases.values()], [*paraphrases]))
        show("their references", judge([captions[number] for number in paraphrases], [*paraphrases]))
        show(
            "another clip's", judge([captions[(number + 7) % len(captions)] for number in paraphrases], [*paraphrases])
        )
    numbers = list(range(min(args.clips, len(records))))
    honest = None
    for name, change in VARIANTS.items():
        found = judge([change(captions[number]) for number in numbers], numbers)
        honest = honest or found
        show(name, found, honest)
        if name == "half":
            late = [row[-max(1, int(0.4 * len(row))) :] for row in found]
            show("half, last 40% of events", late)
    show("another clip's", judge([captions[(number + 7) % len(captions)] for number in numbers], numbers), honest)


def opened(args, captions, events):
    """A function from captions and the numbers of their records to the scores of their events."""

    table = make_table(None, word_weights(captions) if args.idf else None)

    def lexical(texts, numbers):
        references = [{"keypoints": [{"text": event} for event in events[number]]} for number in numbers]
        thresholds = DEFAULTS._replace(low=args.ramp[0], high=args.ramp[1])
        made = [None] * len(texts)
        for one in scores(table, texts, references, [np.nan] * len(texts), thresholds=thresholds):
            made[one.number] = one.scored.keypoints[: len(events[numbers[one.number]])]
        return made

    if args.judge == "lexical":
        return lexical
    name = "embedding" if args.judge == "combined" else args.judge
    judge = open_judge(name, args.judge_model, "float32", Endpoint(args.judge_url, args.judge_model)).__enter__()

    def model(texts, numbers):
        start = time.monotonic()
        found = judge(texts, [events[number] for number in numbers])()
        print(f"  {(time.monotonic() - start) / len(texts):.2f} s a caption")
        return [row[: len(events[number])] for row, number in zip(found, numbers)]

    def combined(texts, numbers):
        pairs = zip(lexical(texts, numbers), model(texts, numbers))
        return [(one + other) / 2 for one, other in pairs]

    return combined if args.judge == "combined" else model


def show(name, found, honest=None):
    """Print the mean R_C, and how often the honest caption scores higher."""
    each = np.array([np.nanmean(row) for row in found])
    ahead = ""
    if honest is not None and found is not honest:
        ahead = f", honest caption ahead in {np.mean(each < [np.nanmean(row) for row in honest]):.1%}"
    print(f"{name}: R_C {each.mean():.3f}{ahead}", flush=True)


def overlap(text, reference, size=4):
    """The share of word n-grams of a text that occur in another."""

    def runs(words):
        return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}

    text_runs = runs(words_of(text))
    return len(text_runs & runs(words_of(reference))) / max(1, len(text_runs))


if __name__ == "__main__":
    main()
