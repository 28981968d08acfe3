"""Fixtures: a fake curator for three clips, and short pauses between retries."""

import pytest
from fake_curator import FakeCurator, make_clips

from avocado_jax.remote import chat


@pytest.fixture
def short_pauses(monkeypatch):
    """Retry after a tenth of a second, and remove an API key from the environment."""
    monkeypatch.setattr(chat, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(chat, "LAST_PAUSE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def curator(tmp_path_factory):
    """A fake curator for three small clips."""
    return FakeCurator(make_clips(tmp_path_factory.mktemp("curate") / "clips", [(0, 0), (1, 0), (2, 1)]))
