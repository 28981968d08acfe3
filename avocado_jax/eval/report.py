"""A self-contained HTML page of a run: its curves, and its captions beside their references.

External text is embedded as JSON that cannot close the script element, and is inserted into the document as text only.
The content security policy of the page allows only the page's script, and only files beside the page.
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
POINTS = 1000  # of a curve at most: more are averaged
ROLLOUT = {"step": int, "id": str, "group": int, "caption": str, "length": int, "rewards": dict}
SAMPLE = {"step": int, "id": str, "caption": str, "reference": str}
# Curves that are shown at first, those that there are.
SHOWN = ("reward", "heldout_reward", "reward_checklist", "reward_dialogue", "reward_length", "reward_timing")
SHOWN += ("reward_probes", "length", "kl", "entropy")
SHOWN += ("loss", "heldout_loss", "accuracy", "heldout_accuracy", "lr", "gradient_norm")
FIRST = 8


class Clip(NamedTuple):
    """What is known of a clip beside its captions."""

    fields: Mapping[str, Any]  # "caption", "dialogues", "keypoints": each may be absent
    video: str | None  # address as seen from the page


def report(run: str, last: int, clips: Callable[[str, str], Clip | None]) -> dict[str, Any]:
    """What the page of a run shows.

    Args:
        run: its folder, local or gs://.
        last: of how many steps, counted from the newest, rollouts are shown; so for held-out captions.
        clips: (kind: "rollouts" or "samples", id) -> what is known of the clip.

    Raises:
        InputError: it is no run, or a file of it is damaged.
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
    references = _marked(groups, known)
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
    """The lines of metrics.jsonl; the last may be half written and is left out then.

    Raises:
        InputError: there are none, or one is damaged.
    """
    where = storage.join(run, "metrics.jsonl")
    text = storage.read(where)
    whole = text[: text.rfind(b"\n") + 1]
    return [line for _, line in parse_lines(whole, where, {"step": int})]


def curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{"name", "steps", "values", "mean" (steps in a point), "shown"} of every scalar, in the order of the lines.

    What is not finite is null. More than POINTS values are averaged, consecutive ones together.
    """
    series: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        perf = line.get("perf") if isinstance(line.get("perf"), dict) else {}
        for name, value in [*line.items(), *((f"perf/{name}", value) for name, value in perf.items())]:
            if name not in ("step", "perf") and (value is None or isinstance(value, NUMBER)):
                series.setdefault(name, []).append((line["step"], value))
    series = {name: points for name, points in series.items() if any(_number(value) is not None for _, value in points)}
    first = [name for name in SHOWN if name in series][:FIRST] or list(series)[:FIRST]
    return [{"name": name, **_thinned(points), "shown": name in first} for name, points in series.items()]


def _thinned(points: list[tuple[int, float | None]]) -> dict[str, Any]:
    many = -(-len(points) // POINTS)
    steps, values = [], []
    for start in range(0, len(points), many):
        part = points[start : start + many]
        known = [value for _, one in part if (value := _number(one)) is not None]
        steps.append(part[-1][0])
        values.append(float(f"{sum(known) / len(known):.7g}") if known else None)
    return {"steps": steps, "values": values, "mean": many}


def _number(value: Any) -> float | None:
    return value if isinstance(value, NUMBER) and math.isfinite(value) else None


def _newest(run: str, kind: str, steps: Sequence[int], last: int) -> tuple[list[int], bool]:
    """The newest `last` finished steps that have a file of this kind, in order; whether there are more."""
    there = set(storage.names(storage.join(run, kind)))
    found = [step for step in steps if f"{step}.jsonl" in there]
    return found[-last:], len(found) > last


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def _rollouts(lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Groups of captions of one clip. A group's captions are counted from 0 and stand together."""
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
        group["captions"].append({"number": line["group"], "text": _composed(line["caption"]), "values": values})
    if group:
        yield group


def _samples(lines: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A held-out caption is a group of one, and brings its reference."""
    for _, line in lines:
        caption = {"number": 0, "text": _composed(line["caption"]), "values": {}}
        yield {"id": line["id"], "step": line["step"], "captions": [caption], "reference": line["reference"]}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _marked(groups: list[dict[str, Any]], known: Sequence[Clip]) -> list[dict[str, Any]]:
    """Put marks into the captions of `groups`; the references as they were compared."""
    references = [
        {name: _checked(name, clip.fields.get(name)) for name in ("caption", "dialogues", "keypoints")}
        for clip in known
    ]
    for group in groups:
        reference = references[group["clip"]]
        reference["caption"] = reference["caption"] or group.pop("reference", None)
    captions = [(group["clip"], caption) for group in groups for caption in group["captions"]]
    marks, compared = mark([one["text"] for _, one in captions], [clip for clip, _ in captions], references)
    for (_, caption), marked in zip(captions, marks):
        caption |= marked
    return compared


def _checked(name: str, value: Any) -> Any:
    """A field of a manifest line as marks take it; None where it is not as it must be."""
    if name == "caption":
        return value if isinstance(value, str) else None
    wanted = {"dialogues": ("speaker", "text"), "keypoints": ("text",)}[name]
    if not isinstance(value, list):
        return None
    whole = [one for one in value if isinstance(one, dict) and all(isinstance(one.get(key), str) for key in wanted)]
    return [{key: one[key] for key in (*wanted, "dimension") if isinstance(one.get(key), str)} for one in whole]


def page(data: Mapping[str, Any], parts: Path = PARTS) -> str:
    """The page of which `parts` holds html, css and js. No text of `data` can end its script, or become markup."""
    html, style, script = ((parts / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    for name, text in {"hash": f"sha256-{hashed}", "style": style, "script": script}.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html.replace("{{data}}", embedded)
