"""`bench rewards`: its captions state what their references have, and its figures are those of the program."""

import json

import jax
import jax.numpy as jnp
import pytest
from counted import flops_of
from oracles import normalize
from reading import quotes

from avocado_jax.bench import measure
from avocado_jax.bench import rewards as bench
from avocado_jax.bench.measure import Ceilings


def test_bench_rewards(monkeypatch):
    """The program is traced, not compiled: compiling it takes longer than all of this file may."""
    given, traced = {}, {}
    monkeypatch.setattr(measure, "ceilings", lambda dtype: Ceilings(1e12, 1e11))
    for name in ("make_table", "make_references"):
        real = getattr(bench, name)
        monkeypatch.setattr(
            bench, name, lambda *args, name=name, real=real: (given.update({name: args}), real(*args))[1]
        )
    score = bench.score_captions

    def trace(*args):
        traced["flops"] = flops_of(jax.make_jaxpr(score)(*args).jaxpr)
        traced["bytes"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args))
        return dict.fromkeys(("checklist", "dialogue"), jnp.ones(args[1].shape[:2]))

    monkeypatch.setattr(bench, "score_captions", trace)
    device_put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda arrays: (given.update(placed=arrays), device_put(arrays))[1])
    result = bench.bench_rewards(4, 2, 100)
    assert result["tflops"] * result["seconds"] * 1e12 == pytest.approx(traced["flops"])
    assert result["bytes_per_second"] * result["seconds"] == pytest.approx(traced["bytes"])
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(4 * 100)

    tokens = [token.replace("Ġ", " ") for token in json.loads(given["make_table"][0])["model"]["vocab"]]
    for group, reference in zip(given["placed"][1], given["make_references"][1]):
        first, other = (quotes("".join(tokens[number] for number in ids)) for ids in group)
        assert [normalize(line) for line in first] == [normalize(line["text"]) for line in reference["dialogues"]]
        assert len(first) == len(other) == bench.LINES
        assert len(reference["keypoints"]) == bench.POINTS
