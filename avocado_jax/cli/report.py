"""Put results of `evaluate` together in the layout of the paper's ablation (Table 4).

  avocado report runs/sft-results runs/grpo-results
  avocado report . --json

FOLDER is searched for result.json as `evaluate` writes it. A row a model, under the paper's own: on video-SALMONN-2
the total of misses and hallucinations, on Daily-Omni the accuracy, on both Dlg.F1 and RepCol, of a hundred. What was
not measured is left empty. With --json one object a model: {"model", "results": {benchmark: metrics}}, all benchmarks.
"""

import argparse
import json
import sys
from pathlib import Path

from avocado_jax.errors import InputError
from avocado_jax.eval.public import read_result
from avocado_jax.eval.tables import ablation_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="holds results, or a file of one")
    parser.add_argument("--json", action="store_true", help="one JSON object a model")


def run(args: argparse.Namespace) -> int:
    """Read, sort by model, print."""
    files: dict[Path, None] = {}
    for folder in args.folders:
        found = sorted(folder.rglob("result.json")) if folder.is_dir() else [folder]
        if not found:
            raise InputError(f"{folder}: holds no result.json of `avocado evaluate`")
        files |= dict.fromkeys(path.resolve() for path in found)
    results = [read_result(path) for path in files]
    models: dict[str, dict] = {}
    for path, result in zip(files, results):
        own = models.setdefault(result["model"], {})
        if result["benchmark"] in own:
            raise InputError(f"{path}: a second result of {result['model']!r:.80} on {result['benchmark']}")
        own[result["benchmark"]] = result["metrics"]
    if args.json:
        for model, own in models.items():
            print(json.dumps({"model": model, "results": own}))
        return 0
    print(ablation_table(results), end="")
    judges = {(result["judge"] or {}).get("model") for result in results if isinstance(result.get("judge"), dict)}
    if len(judges) > 1:
        told = f"these were judged by {len(judges)} judges: the figures are not comparable"
        print(f"avocado report: {told}", file=sys.stderr)
    return 0
