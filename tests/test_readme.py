"""The README shows every command."""

from pathlib import Path

from avocado_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def test_commands_are_shown():
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"avocado {command} " in text
