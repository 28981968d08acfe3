"""Plots of an ablation in PNG format."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from avocado_jax.eval.ablation import METRICS, Arm, Results

COLORS = ("#4c566a", "#8fa3bf", "#3b7dd8", "#2a9d6f", "#d9822b", "#b5485d", "#7a5ea8", "#8a7f4f")
SMOOTHED = 10  # steps of the moving average
CURVES = {
    "reward_dialogue": "R_D",
    "reward_checklist": "R_C",
    "reward_length": "R_L",
    "reward_repetition": "repetition",
    "length": "tokens of a caption",
    "kl": "KL to the start",
}


def arms_plot(arms: Sequence[Arm], results: Results) -> bytes:
    """Plot one panel per metric, with a bar for each arm's mean and a dot for each seed."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 3).flat, METRICS.items()):
        for index, arm in enumerate(arms):
            values = [run[metric] for run in results[arm.name]]
            axes.barh(index, np.mean(values), color=COLORS[index % len(COLORS)], alpha=0.55, height=0.65)
            axes.plot(values, [index] * len(values), "o", color="black", markersize=3, alpha=0.6)
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def curves_plot(arms: Sequence[Arm], runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> bytes:
    """Plot metrics of sampled captions over training steps: the mean and the range of each arm's seeds.

    Args:
        runs: arm trained with rewards -> lines of `metrics.jsonl` by seed.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (name, title) in zip(panels, CURVES.items()):
        for index, arm in enumerate(arms):
            if not runs.get(arm.name):
                continue
            values = np.array([[line[name] for line in lines] for lines in runs[arm.name]], float)
            width = min(SMOOTHED, values.shape[1])
            smooth = np.array([np.convolve(series, np.ones(width) / width, "valid") for series in values])
            steps = np.arange(width, values.shape[1] + 1)
            color = COLORS[index % len(COLORS)]
            axes.plot(steps, smooth.mean(0), color=color, label=arm.name)
            axes.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) or 1, fontsize=9, frameon=False)
    figure.supxlabel(f"step (means of {SMOOTHED})", fontsize=9)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
