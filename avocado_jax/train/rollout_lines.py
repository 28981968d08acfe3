"""The lines of `rollouts/STEP.jsonl`, one per caption of a step."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from avocado_jax.train.rewards import caption_text
from avocado_jax.train.run import Setup


def rollout_lines(
    setup: Setup,
    stops: tuple[int, ...],
    step: int,
    records: Sequence[int],
    tokens: np.ndarray,
    lengths: np.ndarray,
    terms: dict,
    advantage: np.ndarray,
    reward: np.ndarray,
) -> Iterator[str]:
    """Yield a JSON line per caption, in order.

    Args:
        step: number of steps finished before this one.
        records: index of each clip's record; -1: no line.
        tokens, ...: arrays [clips, group, ...].
    """
    for row, record in enumerate(records):
        for caption in range(lengths.shape[1] if record >= 0 else 0):
            at = row, caption
            ids = tokens[at][: lengths[at]].tolist()
            line = {
                "step": step + 1,
                "id": setup.source.index.ids[record],
                "group": caption,
                "caption": caption_text(setup, stops, ids),
                "token_ids": ids,
                "length": int(lengths[at]),
                "rewards": {name: _number(value[at]) for name, value in terms.items()},
                "reward": _number(reward[at]),
                "advantage": _number(advantage[at]),
            }
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _number(value: np.floating) -> float | None:
    """Convert NaN (a term without a reference), which JSON does not support, to None."""
    return float(value) if np.isfinite(value) else None
