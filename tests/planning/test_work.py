"""Work of phases that follows from shapes, of a rollout with another mesh and other rows than the update."""

from dataclasses import replace

import jax
import pytest

from avocado_jax.config import GrpoConfig, MeshConfig, ObjectiveConfig, SamplingConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.models.config import TINY
from avocado_jax.models.flops import decode_bytes, text_layer_parameters
from avocado_jax.planning.program import program_of
from avocado_jax.planning.work import flops_of, layout, microbatches, rows_per_device, traffic_bytes
from avocado_jax.sampling.generate import generate
from avocado_jax.train import rollout
from avocado_jax.train.sft import model_of

CONFIG = GrpoConfig(
    batch=4,
    group=4,
    split=2,
    rollout_batches=2,
    sampling=SamplingConfig(tokens=12),
    objective=ObjectiveConfig(importance_cap=2.0),
)


@pytest.mark.parametrize(
    ("mesh", "split", "shape", "of_device", "parts"),
    [
        (MeshConfig(fsdp=8), 2, (8, 1), 1, 1),  # 8 clips fill 8 shards: each is a row
        (MeshConfig(fsdp=8, rollout_tensor=2), 2, (4, 2), 2, 1),
        (MeshConfig(fsdp=4, tensor=2), 1, (4, 2), 2, 2),  # of as many rows as a batch
    ],
)
def test_the_rows_of_a_rollout_are_those_of_its_mesh(monkeypatch, mesh, split, shape, of_device, parts):
    traced = []

    def record(*args, **options):
        traced.append((args[2].shape, options["parts"]))
        return generate(*args, **options)

    monkeypatch.setattr(rollout, "generate", record)
    config = replace(CONFIG, mesh=mesh, split=split)
    program = program_of(config, model_of(config, TINY), Bucket(Shape(128, 2, 1, 1), 64), jax.devices())
    phases = {phase.name: phase for phase in program.phases}
    traced.clear()
    jax.eval_shape(phases["rollout"].run, *phases["rollout"].args)
    assert traced == [((8, 4), parts)]
    sampler, total, group = layout(program, phases["rollout"])
    assert (total, group) == (8, 4)
    assert (sampler.shape["fsdp"], sampler.shape["tensor"]) == shape
    assert rows_per_device(program, phases["rollout"]) == of_device / parts
    assert microbatches(program, phases["rollout"]) == parts
    assert layout(program, phases["update"]) == (program.mesh, 4 * split, 4 // split)
    assert flops_of(program, phases["rollout"]).machine == flops_of(program, phases["rollout"]).model
    score = flops_of(program, phases["score"])
    assert (score.machine > score.model) == (split == 2)  # each clip twice
    prefill = traffic_bytes(program, phases["rollout"]) - 12 * _token(program, shape[1], of_device)
    # of as many rows as a score, without captions
    assert 0 < prefill / parts < traffic_bytes(program, phases["score"])
    int8 = program._replace(config=replace(config, rollout_int8=True))
    less = traffic_bytes(program, phases["rollout"]) - traffic_bytes(int8, phases["rollout"])
    assert less == 12 * TINY.text.layers * text_layer_parameters(TINY) / shape[1]


def _token(program, tensor, rows):
    """Bytes that a device reads for a token of each of its captions: a part of the weights, and the caches."""
    weights = decode_bytes(program.model, 0, 0, 0, 2)
    caches = decode_bytes(program.model, rows * 128, rows * 4, 12, 2) - weights
    return weights / tensor + caches / min(tensor, program.model.text.kv_heads)
