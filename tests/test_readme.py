"""The README's tree tells the truth: every file of the product stands in it, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tree_names_every_file():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## The tree") : text.index("## How it is built")]
    named, folder = set(), ""
    for line in tree.splitlines():
        if found := re.match(r"(\S+/)(?:\s|$)", line):
            folder = found[1]
        elif found := re.match(r"  (\S+\.(?:py|sh|md)|Containerfile)\s", line):
            named.add(folder + found[1])
    places = [
        path for place in ("avocado_jax", "launch", "configs") for path in (ROOT / place).rglob("*") if path.is_file()
    ]
    files = {
        str(path.relative_to(ROOT))
        for path in places
        if not {"__pycache__", "assets"} & {*path.relative_to(ROOT).parts}
    }
    files = {name for name in files if not name.endswith(("__init__.py", ".pyc"))}
    assert named == files


def test_commands_are_shown():
    from avocado_jax.__main__ import COMMANDS

    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"avocado {command} " in text
