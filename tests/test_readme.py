"""The READMEs: length, links, and commands and configs that README.md shows."""

import re
from pathlib import Path

import pytest

from avocado_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = sorted((ROOT / "avocado_jax").glob("*/README.md"))


def test_commands_and_configs_are_shown():
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"avocado {command} " in text
    for config in (ROOT / "configs").glob("*.py"):
        assert f"`{config.stem}`" in text


def test_readmes_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
    assert len(PACKAGES) >= 11
    for page in PACKAGES:
        assert len(page.read_text().splitlines()) <= 200, page


@pytest.mark.parametrize("page", [ROOT / "README.md", *PACKAGES], ids=lambda page: page.parent.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)#]+)[)#]", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
