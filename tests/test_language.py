"""Identifiers use standard terms: names have none of the vague components listed here."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VAGUE = (
    "told|tell|teller|asked|held|own|so_far|seen|heard|said|apart|fitting|cut|worth|side|room|looked_at|letters|joined|"
    "place|local_rows|sums"
)
ALLOWED = {
    "asked_pixels": "a field of reading.json and of the manifest of prepared data",
    "Told": "the name of a schema in requests to judges, and so part of the keys of cached answers",
    "tell": "a method of Python's files",
}
COMPONENT = re.compile(f"_({VAGUE})_")


def is_vague(name: str) -> bool:
    """Whether a component of a name, in snake_case or CamelCase, is on the list. `held_out` is a standard term."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("held_out", "")
    return bool(COMPONENT.search(f"_{words}_".replace("__", "_")))


def defined_names(tree: ast.Module) -> set[str]:
    """Functions, classes, parameters, variables, attributes and import aliases. Names of tests are excluded."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add("" if node.name.startswith("test_") else node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add(node.asname or "")
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            names.add(node.name or "")
    return names


@pytest.mark.parametrize("folder", ["avocado_jax", "configs", "launch", "tests"])
def test_names_have_no_vague_components(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        vague = filter(is_vague, defined_names(ast.parse(path.read_bytes())) - ALLOWED.keys())
        found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(vague)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "name", ["told", "_told", "front_place", "CutLines", "SIDE", "so_far", "own_prompts", "a_sums"]
)
def test_vague_components_are_found_in_names(name):
    assert is_vague(name)
    assert name in defined_names(ast.parse(f"def f(x, *, {name}=1): pass"))


@pytest.mark.parametrize("name", ["held_out", "heldout_rows", "places", "owner", "outside", "far", "total"])
def test_other_names_are_accepted(name):
    assert not is_vague(name)
