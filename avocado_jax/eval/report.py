"""A self-contained HTML page of a run: its curves, and its captions with their references.

External text is embedded as JSON that cannot close the script element, and is inserted into the document only as text.
The content security policy of the page allows only the page's script and files in the page's folder.
"""

import base64
import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.eval.marks import mark
from avocado_jax.jsonl import NUMBER, parse_lines
from avocado_jax.rewards.combine import TERMS

PARTS = Path(__file__).parents[1] / "assets" / "view"
POINTS = 1000  # maximum points of a curve; more are averaged
ROLLOUT = {"step": int, "id": str, "group": int, "caption": str, "length": int, "rewards": dict}
SAMPLE = {"step": int, "id": str, "caption": str, "reference": str}
# Curves that are selected initially, if they exist.
SHOWN = ("reward", "heldout_reward", "reward_checklist", "reward_dialogue", "reward_length", "reward_timing")
SHOWN += ("reward_probes", "length", "kl", "entropy")
SHOWN += ("loss", "heldout_loss", "accuracy", "heldout_accuracy", "lr", "gradient_norm")
FIRST = 8


class Clip(NamedTuple):
    """The reference and video of a clip."""

    fields: Mapping[str, Any]  # "caption", "dialogues", "keypoints"; each may be missing
    video: str | None  # URL relative to the page


def report(run: str, last: int, clips: Callable[[str, str], Clip | None]) -> dict[str, Any]:
    """Collect the data of a run's page.

    Args:
        run: the run folder, local or gs://.
        last: number of newest steps whose rollouts are shown, and of those whose held-out captions are shown.
        clips: (kind: "rollouts" or "samples", id) -> the clip, or None if unknown.

    Raises:
        InputError: the folder is not a run, or a file is damaged.
    """
    lines = metrics(run)
    kinds = {"rollouts": (ROLLOUT, _rollouts), "samples": (SAMPLE, _samples)}
    groups, notes, owners = [], [], {}
    for kind, (fields, read) in kinds.items():
        steps, found = _newest(run, kind, [line["step"] for line in lines], last)
        for step in steps:
            name = f"{kind}/{step}.jsonl"
            where = storage.join(run, name)
            for group in read(parse_lines(storage.read(where), where, fields)):
                groups.append({"kind": kind, "clip": owners.setdefault((kind, group.pop("id")), len(owners)), **group})
        if steps:
            what = "Rollouts" if kind == "rollouts" else "Held-out captions"
            more = f"; there are more: increase --last, which is {last}" if found else " (all)"
            notes.append(f"{what} of {_steps(steps)}{more}.")
    known = [clips(*owner) or Clip({}, None) for owner in owners]
    references = _add_marks(groups, known)
    shown = [
        {"id": name, "video": clip.video, **reference} for (_, name), clip, reference in zip(owners, known, references)
    ]
    config = storage.join(run, "config.json")
    settings = json.loads(storage.read(config)) if storage.exists(config) else {}
    return {
        "name": run.rstrip("/").rsplit("/", 1)[-1],
        "config": settings,
        "weights": weights(settings),
        "steps": len(lines),
        "curves": curves(lines),
        "notes": notes,
        "groups": groups,
        "clips": shown,
    }


def weights(config: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each reward term in the config of a run."""
    rewards = config.get("rewards") or {}
    extra = (term.rpartition(":")[2].partition("=") for term in rewards.get("extra", ()))
    return {name: rewards[name] for name in TERMS if name in rewards} | {
        name: float(weight) for name, _, weight in extra
    }


def metrics(run: str) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl. An incomplete last line is skipped.

    Raises:
        InputError: the file is missing, or a line is damaged.
    """
    where = storage.join(run, "metrics.jsonl")
    text = storage.read(where)
    complete = text[: text.rfind(b"\n") + 1]
    return [line for _, line in parse_lines(complete, where, {"step": int})]


def curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curve of every scalar: {"name", "steps", "values", "mean" (steps per point), "shown"}.

    Values that are not finite become null. More than POINTS values are averaged in consecutive groups.
    """
    series: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        perf = line.get("perf") if isinstance(line.get("perf"), dict) else {}
        for name, value in [*line.items(), *((f"perf/{name}", value) for name, value in perf.items())]:
            if name not in ("step", "perf") and (value is None or isinstance(value, NUMBER)):
                series.setdefault(name, []).append((line["step"], value))
    series = {name: points for name, points in series.items() if any(_number(value) is not None for _, value in points)}
    first = [name for name in SHOWN if name in series][:FIRST] or list(series)[:FIRST]
    return [{"name": name, **_thin(points), "shown": name in first} for name, points in series.items()]


def _thin(points: list[tuple[int, float | None]]) -> dict[str, Any]:
    many = -(-len(points) // POINTS)
    steps, values = [], []
    for start in range(0, len(points), many):
        part = points[start : start + many]
        known = [number for _, value in part if (number := _number(value)) is not None]
        steps.append(part[-1][0])
        values.append(float(f"{sum(known) / len(known):.7g}") if known else None)
    return {"steps": steps, "values": values, "mean": many}


def _number(value: Any) -> float | None:
    return value if isinstance(value, NUMBER) and math.isfinite(value) else None


def _newest(run: str, kind: str, steps: Sequence[int], last: int) -> tuple[list[int], bool]:
    """The newest `last` finished steps with a file of this kind, in order; and whether there are more."""
    there = set(storage.names(storage.join(run, kind)))
    found = [step for step in steps if f"{step}.jsonl" in there]
    return found[-last:], len(found) > last


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def _rollouts(lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield groups of captions of one clip. The captions of a group are consecutive lines, numbered from 0."""
    group: dict[str, Any] = {}
    for where, line in lines:
        values = [*line["rewards"].values(), line.get("reward"), line.get("advantage")]
        if not all(value is None or isinstance(value, NUMBER) for value in values):
            raise InputError(f"{where}: rewards and advantage must be numbers or null")
        if group and (line["group"] == 0 or line["id"] != group["id"]):
            yield group
            group = {}
        group = group or {"id": line["id"], "step": line["step"], "captions": []}
        rewards = {"reward": line["reward"]} if "reward" in line else {}
        rewards |= {**line["rewards"], "advantage": line.get("advantage")}
        values = {name: _number(value) for name, value in rewards.items()} | {"tokens": line["length"]}
        group["captions"].append({"number": line["group"], "text": _to_nfc(line["caption"]), "values": values})
    if group:
        yield group


def _samples(lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield held-out captions as groups of one, with their references."""
    for _, line in lines:
        caption = {"number": 0, "text": _to_nfc(line["caption"]), "values": {}}
        yield {"id": line["id"], "step": line["step"], "captions": [caption], "reference": line["reference"]}


def _to_nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _add_marks(groups: list[dict[str, Any]], known: Sequence[Clip]) -> list[dict[str, Any]]:
    """Add marks to the captions of `groups`. Returns the compared references."""
    references = [
        {name: _checked(name, clip.fields.get(name)) for name in ("caption", "dialogues", "keypoints")}
        for clip in known
    ]
    for group in groups:
        reference = references[group["clip"]]
        reference["caption"] = reference["caption"] or group.pop("reference", None)
    captions = [(group["clip"], caption) for group in groups for caption in group["captions"]]
    marks, compared = mark([caption["text"] for _, caption in captions], [clip for clip, _ in captions], references)
    for (_, caption), marked in zip(captions, marks):
        caption |= marked
    return compared


def _checked(name: str, value: Any) -> Any:
    """Validate a field of a manifest line for `mark`; None if it is invalid."""
    if name == "caption":
        return value if isinstance(value, str) else None
    wanted = {"dialogues": ("speaker", "text"), "keypoints": ("text",)}[name]
    if not isinstance(value, list):
        return None

    def is_valid(item: Any) -> bool:
        return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in wanted)

    return [
        {key: item[key] for key in (*wanted, "dimension") if isinstance(item.get(key), str)}
        for item in filter(is_valid, value)
    ]


def page(data: Mapping[str, Any], parts: Path = PARTS) -> str:
    """Build the page from the html, css and js in `parts`. Text in `data` cannot close the script or become markup."""
    html, style, script = ((parts / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    for name, text in {"hash": f"sha256-{hashed}", "style": style, "script": script}.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html.replace("{{data}}", embedded)
