"""Combine results of `evaluate` in the layout of the paper's ablation (Table 4).

  avocado report runs/sft-results runs/grpo-results
  avocado report . --json

FOLDER, local or gs://, is searched for the result.json files of `evaluate`. The table has one row per model, below the
rows of the paper: the total of misses and hallucinations of video-SALMONN-2, the accuracy of Daily-Omni, and Dlg.F1 and
RepCol of both, in percent. Missing results are left empty. --json prints one object per model with all benchmarks:
{"model", "results": {benchmark: metrics}}.
"""

import argparse
import json
import os
import sys

from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.eval.public import read_result
from avocado_jax.eval.tables import ablation_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder with results, or one result file")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")


def run(args: argparse.Namespace) -> int:
    """Read the results and print them by model."""
    files: dict[str, None] = {}
    for folder in args.folders:
        if not (found := _results(folder)):
            raise InputError(f"{folder}: no result.json of `avocado evaluate`")
        files |= dict.fromkeys(found)
    results = [read_result(path) for path in files]
    models: dict[str, dict] = {}
    for path, result in zip(files, results):
        figures = models.setdefault(result["model"], {})
        if result["benchmark"] in figures:
            raise InputError(f"{path}: a second result of {result['model']!r:.80} on {result['benchmark']}")
        figures[result["benchmark"]] = result["metrics"]
    if args.json:
        for model, figures in models.items():
            print(json.dumps({"model": model, "results": figures}))
        return 0
    print(ablation_table(results), end="")
    judges = {(result["judge"] or {}).get("model") for result in results if isinstance(result.get("judge"), dict)}
    if len(judges) > 1:
        warning = f"these were judged by {len(judges)} judges: the figures are not comparable"
        print(f"avocado report: {warning}", file=sys.stderr)
    return 0


def _results(given: str) -> list[str]:
    """The result files in a folder, or the given file."""
    if given.endswith(".json") or not (storage.is_remote(given) or os.path.isdir(given)):
        return [given]
    folder = given if storage.is_remote(given) else os.path.realpath(given)
    names = [file.name for file in storage.listing(folder) if file.name.rpartition("/")[2] == "result.json"]
    return [storage.join(folder, name) for name in names]
