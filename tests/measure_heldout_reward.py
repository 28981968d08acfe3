"""Held-out reward R_C + R_D + R_L of the captions of an ablation's runs, by the thresholds of its config. Run by hand.

  python tests/measure_heldout_reward.py CONFIG OUT/ARM/SEED ... [-- OUT/ARM/SEED ...]

Reads heldout.json of each run of `avocado ablate`. With two lists of runs of the same seeds, it also prints the mean of
the paired differences, the first list minus the second, and its 95% interval (Student's t).
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from scipy import stats

from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.config import load
from avocado_jax.data.words import load_words
from avocado_jax.rewards.combine import Thresholds, make_references, score_captions
from avocado_jax.rewards.text import limits_for
from avocado_jax.rewards.vocabulary import make_table
from avocado_jax.train.inputs import open_source


def main() -> None:
    """Print a line per run, then the comparison."""
    name, *runs = sys.argv[1:]
    config = load(name)
    rewards, length = config.rewards, config.sampling.tokens
    source, _ = open_source(config.data.heldout, config.data)
    clips = [source[number].fields for number in range(len(source.index.ids))]
    words = load_words(open_checkpoint("avocado_jax/assets/captioner").config_folder)
    limits, table = limits_for(length)._replace(quotes=rewards.lines), make_table(words.json)
    references, _ = make_references(table, clips, limits, rewards.keypoints)
    thresholds = Thresholds(
        low=rewards.covered_low, high=rewards.covered_high, length_low=rewards.low, length_high=rewards.high
    )
    score = jax.jit(partial(score_captions, thresholds=thresholds, limits=limits))
    groups: list[list[float]] = [[]]
    for run in runs:
        if run == "--":
            groups.append([])
            continue
        captions = json.loads((Path(run) / "heldout.json").read_text())["captions"]
        tokens, lengths = np.zeros((len(clips), 1, length), np.int32), np.zeros((len(clips), 1), np.int32)
        for row, clip in enumerate(clips):
            ids = words.encode(captions[clip["id"]])[:length]
            tokens[row, 0, : len(ids)] = ids
            lengths[row] = len(ids)
        terms = jax.device_get(score(table, tokens, lengths, references))
        means = {term: float(np.nanmean(terms[term])) for term in ("checklist", "dialogue", "length")}
        groups[-1].append(sum(means.values()))
        print(f"{run}: {groups[-1][-1]:.4f}  " + ", ".join(f"{term} {value:.4f}" for term, value in means.items()))
    if len(groups) == 2:
        first, second = map(np.array, groups)
        differences = first - second
        half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
        print(f"{first.mean():.4f} against {second.mean():.4f}: {differences.mean():+.4f} ± {half:.4f} (95%)")


if __name__ == "__main__":
    main()
