"""Compare captions of AVWorld's clips with the truth, and several captioners with the first, clip by clip.

python launch/compare_captions.py clips.jsonl before=captions-1.jsonl after=captions-2.jsonl
python launch/compare_captions.py clips.jsonl --show 2 before=captions-1.jsonl

The first prints the mean of each measure, and its change with two standard errors of the paired difference.
The second prints the captions of some clips beside the truth. The files are those of `avocado evaluate world --out`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avocado_jax.eval.metrics import collapses
from avocado_jax.world.check import measure
from avocado_jax.world.truth import read_truth

MEASURES = ("event_recall", "hallucination", "order", "dialogue_f1", "repcol")


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path, help="clips.jsonl of `avocado world`")
    parser.add_argument("captions", nargs="+", metavar="NAME=FILE", help="captions of `avocado evaluate world`")
    parser.add_argument("--show", type=int, metavar="N", help="print the captions of the first N clips instead")
    args = parser.parse_args()
    records = list(read_truth(args.truth, {"video": str}).values())
    captions = {name: read_captions(Path(file)) for name, _, file in (one.partition("=") for one in args.captions)}
    for name, texts in captions.items():
        if missing := [record["id"] for record in records if record["id"] not in texts]:
            raise SystemExit(f"compare_captions.py: {name}: no caption of {len(missing)} clips, such as {missing[0]}")
    if args.show:
        show(records[: args.show], captions, args.truth.parent)
        return
    (first, before), *others = (
        (name, [scores(texts[record["id"]], record) for record in records]) for name, texts in captions.items()
    )
    for name, after in others:
        print("\n".join(comparison(first, before, name, after)))


def read_captions(file: Path) -> dict[str, str]:
    """The newest caption of each clip."""
    lines = map(json.loads, file.read_text().splitlines())
    return {line["id"]: line["caption"] for line in lines if "caption" in line}


def show(records: Sequence[dict[str, Any]], captions: dict[str, dict[str, str]], folder: Path) -> None:
    """Print the captions of these clips beside the truth."""
    width = max(map(len, [*captions, "truth"])) + 1
    for record in records:
        print(folder / record["video"])
        for name, text in [("truth", record["caption"]), *((one, of[record["id"]]) for one, of in captions.items())]:
            print(f"  {name + ':':{width}} {' '.join(text.split())}")


def scores(caption: str, record: dict[str, Any]) -> tuple[float, ...]:
    """MEASURES of a caption."""
    return (*measure(caption, record), float(collapses(caption)))


def comparison(
    first: str, before: Sequence[tuple[float, ...]], second: str, after: Sequence[tuple[float, ...]]
) -> list[str]:
    """A table of the means of both, and of the differences clip by clip."""
    rows = [f"{f'{len(before)} clips':16} {first:>10} {second:>10}   change (two standard errors)"]
    for name, old, new in zip(MEASURES, zip(*before), zip(*after)):
        change = [b - a for a, b in zip(old, new)]
        mean, bound = average(change), 2 * standard_error(change)
        verdict = "beyond noise" if abs(mean) > bound else "within noise"
        rows.append(f"{name:16} {average(old):10.3f} {average(new):10.3f}   {mean:+.3f} ± {bound:.3f}  {verdict}")
    return rows


def average(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    mean = average(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


if __name__ == "__main__":
    main()
