"""Run `evaluate world` on the clips of conftest.py."""

import json

from avocado_jax.__main__ import main

OPTIONS = ["--max-new-tokens", "100", "--batch", "2", "--json"]
CLIPS = 6


def evaluate(capsys, world, *more, status=0):
    """Run the command. Returns its JSON object and stderr."""
    capsys.readouterr()
    assert main(["evaluate", "world", "--data", str(world / "clips.jsonl"), *OPTIONS, *map(str, more)]) == status
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == (status == 0)
    return (json.loads(lines[0]) if lines else None), captured.err
