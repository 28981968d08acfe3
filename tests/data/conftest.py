"""Clips shared by the tests of the reader, and the reference made importable."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision_ops  # noqa: F401  before anything that imports torchvision
from clips import GOOD


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`clip(name)` is the path of a good clip, written when first asked for."""
    folder = tmp_path_factory.mktemp("clips")

    def made(name: str) -> Path:
        path = folder / name
        return path if path.exists() else GOOD[name](path)

    return made
