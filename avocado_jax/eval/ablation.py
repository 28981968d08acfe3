"""The ablation of the reward terms: arms, their results, and differences between arms.

An arm is a way of training a captioner after its fine-tuning. All arms run with the same seeds, and so with the same
clips in the same order. Arms are compared seed by seed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from avocado_jax.errors import InputError
from avocado_jax.fields import TERM_KINDS
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import weight_of

PAPER = (  # the rows of the paper's ablation
    "SFT=init",
    "SFT + SFT=sft",
    "R_D=dialogue",
    "R_D + R_C=dialogue,checklist",
    "R_D + R_C + R_L=dialogue,checklist,length",
)
METRICS = {  # metric of `evaluate world` -> column title
    "event_recall": "event recall",
    "hallucination": "hallucination",
    "order": "order",
    "dialogue_f1": "Dlg.F1",
    "repcol": "RepCol",
    "length": "length",
}
IN_SOME = {"time_iou": "time IoU"}  # optional metrics besides user terms: only if captions have timed scenes, else 0
ERRORS = 2.0  # standard errors above which a mean difference is significant
Results = Mapping[str, Sequence[Mapping[str, float]]]  # arm -> metrics by seed; one entry for an arm without seeds


class Arm(NamedTuple):
    """The training after the initial fine-tuning.

    Attributes:
        stage: "init": no training; "sft": more fine-tuning on the same clips; "grpo".
        weights: weights of GRPO's reward terms; user terms are named KIND:MODULE:FUNCTION.
    """

    name: str
    stage: str
    weights: dict[str, float]

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Parse arms: `NAME=init`, `NAME=sft` or `NAME=TERM[:WEIGHT],...`; a user term is KIND:MODULE:FUNCTION[=WEIGHT].

    Raises:
        InputError: a text has another form, or two arms have the same folder.
    """
    arms = [_parse(text) for text in texts]
    slugs = [arm.slug for arm in arms]
    for arm in arms:
        if not arm.slug or slugs.count(arm.slug) > 1:
            raise InputError(f"--arm {arm.name}: names of arms must be unique and have letters or digits")
    return arms


def _parse(text: str) -> Arm:
    name, equals, stage = text.partition("=")
    if not equals:
        raise InputError(f"--arm {text}: not NAME=init, NAME=sft or NAME=TERM[:WEIGHT],...")
    if stage in ("init", "sft"):
        return Arm(name.strip(), stage, {})
    weights = {}
    for part in stage.split(","):
        term, _, weight = part.strip().partition(":")
        if term in TERM_KINDS:
            term, weight = weight_of(part.strip())
        if (term not in TERMS and ":" not in term) or term in weights:
            known = f"{', '.join(TERMS)}, jax:MODULE:FUNCTION, host:MODULE:FUNCTION"
            raise InputError(f"--arm {text}: {term!r} is not one of {known}, each once")
        try:
            weights[term] = float(weight or 1)
        except ValueError:
            raise InputError(f"--arm {text}: {weight!r} is not a weight") from None
    return Arm(name.strip(), "grpo", weights)


def base_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm to compare with: the last previous arm whose terms are a proper subset."""
    before = [earlier for earlier in arms[: arms.index(arm)] if earlier.stage != "sft"]
    if arm.stage == "grpo":
        before = [earlier for earlier in before if earlier.weights.items() < arm.weights.items()]
    return before[-1] if before else None


class Difference(NamedTuple):
    """The mean difference of an arm to its base arm over seeds.

    Attributes:
        error: standard error of the mean; None with a single seed.
        shown: whether the mean exceeds two standard errors.
    """

    mean: float
    error: float | None
    shown: bool


def difference(arm: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]], metric: str) -> Difference:
    """Compare an arm with its base by seed. A base without seeds is compared with each seed."""
    differences = np.array(
        [result.get(metric, 0.0) - base[seed % len(base)].get(metric, 0.0) for seed, result in enumerate(arm)]
    )
    if len(differences) < 2:
        return Difference(float(differences.mean()), None, False)
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    return Difference(float(differences.mean()), error, bool(abs(differences.mean()) > ERRORS * error))


def summary(arms: Sequence[Arm], results: Results) -> list[dict[str, Any]]:
    """Summarize each arm: mean and standard deviation over seeds, and differences to its base arm."""
    rows = []
    measured = (name for runs in results.values() for run in runs for name in run)
    metrics = list(dict.fromkeys([*METRICS, *measured]))
    for arm in arms:
        values, base = results[arm.name], base_of(arm, arms)
        row: dict[str, Any] = {"arm": arm.name, "stage": arm.stage, "weights": arm.weights, "runs": len(values)}
        by_metric = {metric: np.array([run.get(metric, 0.0) for run in values]) for metric in metrics}
        row["mean"] = {metric: float(value.mean()) for metric, value in by_metric.items()}
        row["std"] = {
            metric: float(value.std(ddof=1)) if len(value) > 1 else None for metric, value in by_metric.items()
        }
        if base:
            row["over"] = base.name
            found = {metric: difference(values, results[base.name], metric) for metric in metrics}
            row["difference"] = {metric: value._asdict() for metric, value in found.items()}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a Markdown table: the arms, then the differences; significant ones are bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    titles = {name: (METRICS | IN_SOME).get(name, name) for name in rows[0]["mean"]}
    head = [line(["", *titles.values()]), line(["---"] * (len(titles) + 1))]
    values = [line([row["arm"], *(_mean_and_std(metric, row) for metric in titles)]) for row in rows]
    added = [
        line(
            [
                f"{row['arm']} over {row['over']}",
                *(_format_difference(metric, row["difference"][metric]) for metric in titles),
            ]
        )
        for row in rows
        if "over" in row
    ]
    return "\n".join([*head, *values, *added]) + "\n"


def _number(metric: str, value: float, sign: str = "") -> str:
    return format(value, f"{sign}.1f" if metric == "length" else f"{sign}.3f")


def _mean_and_std(metric: str, row: Mapping[str, Any]) -> str:
    mean, std = row["mean"][metric], row["std"][metric]
    return _number(metric, mean) + ("" if std is None else f" ± {_number(metric, std)}")


def _format_difference(metric: str, entry: Mapping[str, Any]) -> str:
    text = _number(metric, entry["mean"], "+")
    if entry["error"] is not None:
        text += f" ± {_number(metric, ERRORS * entry['error'])}"
    return f"**{text}**" if entry["shown"] else text
