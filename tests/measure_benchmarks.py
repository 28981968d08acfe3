"""Load official files, and print the metrics of their reference captions that need no judge.

python tests/measure_benchmarks.py video-salmonn-2=FILE daily-omni=FILE ...
"""

import sys
from pathlib import Path

from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.metrics import text_metrics
from avocado_jax.eval.scoring import dialogue_scores


def main():
    """Measure and print."""
    for given in sys.argv[1:]:
        name, _, file = given.partition("=")
        records = BENCHMARKS[name].read(Path(file))
        truths = sum(len(record.truth or ()) for record in records)
        references = [record.reference for record in records]
        print(f"{name}: {len(records)} clips, {truths} events or questions, {sum(map(bool, references))} references")
        if not all(references):
            continue
        itself = [score for score in dialogue_scores(references, references) if score is not None]
        other = [score for score in dialogue_scores(references[1:] + references[:1], references) if score is not None]
        repcol = text_metrics(references, [None] * len(references))["repcol"]
        print(
            f"  {len(itself)} with dialogue; R_D of itself {sum(itself) / max(1, len(itself)):.4f}, "
            f"of the next clip's caption {sum(other) / max(1, len(other)):.4f}; RepCol {repcol:.4f}"
        )


if __name__ == "__main__":
    main()
