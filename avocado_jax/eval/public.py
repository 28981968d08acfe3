"""Results of a public benchmark: figures, the judge's answers for each clip, and an HTML page."""

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Judged, Record
from avocado_jax.eval.metrics import collapses, text_metrics
from avocado_jax.eval.report import page
from avocado_jax.eval.runner import Caption, Videos
from avocado_jax.eval.scoring import dialogue_scores
from avocado_jax.eval.tables import notes, result_table

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
PARTS = Path(__file__).parents[1] / "assets" / "evaluate"
REASONS = 5  # number of reported reasons for missing answers, most frequent first


def find_video(videos: Videos, record: Record) -> str:
    """Find the file of a clip by its names, with or without folders, and with any video suffix if it has none.

    Returns the first candidate if no file exists. Names that lead out of the folder are skipped.
    """
    paths = []
    for name in record.videos:
        pure = PurePosixPath(name)
        for path in (pure, PurePosixPath(pure.name)):
            if path.is_absolute() or ".." in path.parts or "\0" in name:
                continue
            ends = ("",) if path.suffix.lower() in SUFFIXES else SUFFIXES
            paths += [storage.join(videos.folder, f"{path}{end}") for end in ends]
    first = paths[0] if paths else storage.join(videos.folder, "no file name")
    return next((path for path in paths if videos.size(path) is not None), first)


def results(
    benchmark: Benchmark,
    records: Sequence[Record],
    captions: Mapping[str, Caption],
    failed: Sequence[str],
    rounds: Sequence[Sequence[Judged]],
    judge: Mapping[str, Any] | None,
    model: str,
    decoding: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the figures of a benchmark and a line for each clip.

    Args:
        captions: record id -> caption.
        failed: ids of records without a caption; their captions are empty.
        rounds: the judge's answers [rounds][records]; empty without a judge.
        judge: description of the judge: "model", "prompts" and optional fields.
        model: the model of the captions.
        decoding: decoding settings of the captions; None for captions from a file.
    """
    texts = [captions[record.id].text for record in records]
    dialogue = dialogue_scores(texts, [record.reference for record in records])
    known = [value for value in dialogue if value is not None]
    plain = text_metrics(texts, [captions[record.id].tokens for record in records])
    measured = [benchmark.measure(judged) for judged in rounds]
    chosen = _median([figures[benchmark.headline] for figures in measured]) if rounds else None
    metrics = dict(measured[chosen]) if rounds else {}
    metrics["dialogue_f1"] = 100 * sum(known) / len(known) if known else None
    metrics |= {"repcol": 100 * plain["repcol"], "length": plain["length"]}
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "model": model,
        "judge": dict(judge) if judge else None,
        "decoding": dict(decoding) if decoding else None,
        "n": len(records),
        "metrics": metrics,
        "failed": list(failed),
    }
    if rounds:
        units = [unit for judged in rounds for answers in judged for unit in answers.units]
        why = Counter(unit["why"] for unit in units if "why" in unit)
        result |= {
            "asked": len(units),
            "missing": why.total(),
            "why": dict(why.most_common(REASONS)),
            "rounds": measured,
            "by": by_group(benchmark.measure, rounds[chosen]),
        }
        if len(rounds) > 1:
            result["spread"] = {
                name: [min(values), max(values)]
                for name in measured[0]
                if (values := [figures[name] for figures in measured if figures[name] is not None])
            }
    lines = []
    for number, (record, text, score) in enumerate(zip(records, texts, dialogue)):
        answers = [judged[number] for judged in rounds]
        figure = benchmark.measure([answers[chosen]])[benchmark.headline] if rounds else None
        lines.append(
            {
                "id": record.id,
                "caption": text,
                "tokens": captions[record.id].tokens,
                "reference": record.reference,
                "figure": figure,
                "dialogue_f1": None if score is None else 100 * score,
                "repcol": collapses(text),
                "failed": record.id in result["failed"],
                "chosen": chosen,
                "rounds": [judged.units for judged in answers],
            }
        )
    return result, lines


def by_group(
    measure: Callable[[Sequence[Judged]], dict[str, float | None]], judged: Sequence[Judged]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures by group: {kind: {group: {"n" (questions), ...}}}, for groups of clips and types of questions."""
    parts: dict[str, dict[str, list[Judged]]] = {}
    for answers in judged:
        for kind, group in answers.record.groups.items():
            parts.setdefault(kind, {}).setdefault(group, []).append(answers)
        for group in dict.fromkeys(unit["type"] for unit in answers.units if "type" in unit):
            subset = answers._replace(units=[unit for unit in answers.units if unit["type"] == group])
            parts.setdefault("type", {}).setdefault(group, []).append(subset)
    return {
        kind: {
            group: {"n": sum(len(member.units) for member in members), **measure(members)}
            for group, members in sorted(groups.items())
        }
        for kind, groups in parts.items()
    }


def write(
    folder: str, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], videos: Mapping[str, str]
) -> None:
    """Write result.json, table.md, items.jsonl and page.html, each atomically, to a folder, local or gs://.

    Raises:
        InputError, StorageError: the folder cannot be written.
    """
    shown = [
        {
            **{name: line[name] for name in ("id", "caption", "reference", "figure", "dialogue_f1", "repcol")},
            "video": _address(videos[line["id"]], folder) if line["id"] in videos else None,
            "units": line["rounds"][line["chosen"]] if line["rounds"] else [],
        }
        for line in lines
    ]
    data = {"title": result["title"], "model": result["model"], "metrics": result["metrics"], "notes": notes(result)}
    texts = {
        "result.json": json.dumps(result, indent=1),
        "table.md": result_table(result),
        "items.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "page.html": page(data | {"items": shown}, PARTS),
    }
    for name, text in texts.items():
        storage.write(storage.join(folder, name), text.encode("utf-8", "replace"))


def read_result(path: str) -> dict[str, Any]:
    """Read a result of `write`.

    Raises:
        InputError: the file is not a result.
        StorageError: storage failed.
    """
    try:
        result = json.loads(storage.read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    sound = isinstance(result, dict) and isinstance(result.get("metrics"), dict)
    if not sound or not all(isinstance(result.get(name), str) for name in ("benchmark", "model")):
        raise InputError(f"{path}: not a result of `avocado evaluate`")
    if not all(value is None or type(value) in (int, float) for value in result["metrics"].values()):
        raise InputError(f'{path}: "metrics" must be numbers or null')
    return result


def _median(values: Sequence[float | None]) -> int:
    """The index of the median (the lower one of two); 0 if all values are missing."""
    known = [value for value in values if value is not None]
    return values.index(statistics.median_low(known)) if known else 0


def _address(video: str, folder: str) -> str | None:
    """The URL of a clip relative to the folder; None unless both are local."""
    if storage.is_remote(folder) or not os.path.isfile(video):
        return None
    return "./" + quote(os.path.relpath(os.path.realpath(video), os.path.realpath(folder)))
