"""Fixtures: a remote judge with short pauses, three captions, and their true verdicts."""

import time

import numpy as np
import pytest

from avocado_jax.remote import chat as module
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.judge import RemoteJudge

CAPTIONS = ["a dog barks at the red door", "a cat sleeps", ""]
KEYPOINTS = [["a dog", "a cat", "red door"], ["a dog", "cat"], ["a dog"]]
TRUTH = np.array([[1, 0, 1], [0, 1, np.nan], [0, np.nan, np.nan]], np.float32)
UNKNOWN = np.full_like(TRUTH, np.nan)


@pytest.fixture
def short_pauses(monkeypatch):
    """Pauses of a tenth of a second, and no API key of the environment."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module, "LAST_PAUSE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_batch(url, captions=CAPTIONS, keypoints=KEYPOINTS, **fields):
    """Scores of a batch, its counts and its time in seconds."""
    with RemoteJudge(Endpoint(url, "judge-1", **{"patience": 20.0, "timeout": 5.0, **fields})) as judge:
        start = time.monotonic()
        scores = judge(captions, keypoints)()
        return scores, judge, time.monotonic() - start
