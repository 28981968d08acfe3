"""Markdown tables of results: one result with published figures, or several in the layout of the paper's ablation."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from avocado_jax.eval.published import ABLATION, ABLATION_COLUMNS, PUBLISHED

SHARED = {"dialogue_f1": "Dlg.F1", "repcol": "RepCol"}


def result_table(result: Mapping[str, Any]) -> str:
    """A benchmark's result below the published ones, with its spread over rounds and its figures by group."""
    metrics, published = result["metrics"], PUBLISHED[result["benchmark"]]
    lines = [f"# {_safe(result['title'])}", ""]
    rows = [[f"{name} (published)", *(_number(row.get(key)) for key in metrics)] for name, row in published.items()]
    rows.append([f"**{_safe(result['model'])}**", *map(_number, metrics.values())])
    if spread := result.get("spread"):
        ends = [spread.get(name) for name in metrics]
        ranges = [f"{_number(pair[0])} to {_number(pair[1])}" if pair else "" for pair in ends]
        rows.append([f"over {len(result['rounds'])} rounds", *ranges])
    lines += _table(["", *metrics], rows)
    for kind, groups in result.get("by", {}).items():
        names = list(next(iter(groups.values())))
        rows = [[_safe(group), *(_number(figures[name]) for name in names)] for group, figures in groups.items()]
        lines += ["", *_table([f"by {kind}", *names], rows)]
    lines += ["", *(f"- {_safe(note)}" for note in notes(result))]
    return "\n".join(lines) + "\n"


def notes(result: Mapping[str, Any]) -> list[str]:
    """Notes on how the figures were obtained."""
    judge, lines = result["judge"], [f"{result['n']} clips"]
    if judge is None:
        lines.append("no judge was asked")
    else:
        lines.append(f"judge {judge['model']}, {judge['prompts']} prompts, {len(result['rounds'])} rounds")
        named = [f"{name} ({count})" for name, count in judge.get("returned", {}).items() if name]
        lines += [f"models of the answers, as the endpoint named them: {', '.join(named)}"] * bool(named)
        lines += [f"as published: {note}" for note in judge.get("official", ())]
        left = "" if judge.get("official") else " and left out of the figures"
        lines.append(f"{result['missing']} of {result['asked']} answers are missing{left}")
        lines += [f"{count} times: {why}" for why, count in result["why"].items()]
        if judge["prompts"] == "our own":
            lines.append("published figures were judged with other prompts; wording moves the numbers")
    if result["failed"]:
        lines.append(f"{len(result['failed'])} clips have no caption and count as empty ones")
    return lines


def ablation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results by model in the layout of the paper's Table 4, below the rows of the paper."""
    header = ["model"]
    for benchmark, _, title in ABLATION_COLUMNS:
        header += [f"{benchmark} {title}", *SHARED.values()]
    rows = [[f"{name} (published)", *map(_number, values)] for name, values in ABLATION.items()]
    rows += [[_safe(name), *map(_number, values)] for name, values in ablation_rows(results).items()]
    return "\n".join(_table(header, rows)) + "\n"


def ablation_rows(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The figures of Table 4 for each model; None for missing results."""
    models = list(dict.fromkeys(result["model"] for result in results))
    found = {(result["model"], result["benchmark"]): result["metrics"] for result in results}
    return {
        model: [
            found.get((model, benchmark), {}).get(name)
            for benchmark, measure, _ in ABLATION_COLUMNS
            for name in (measure, *SHARED)
        ]
        for model in models
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _safe(text: str) -> str:
    """Escape a text for Markdown and HTML, in one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escaped)
