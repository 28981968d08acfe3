"""Arrays on the devices beside each phase of GRPO: a plan against a real step."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from avocado_jax.config import load
from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.program import model_and_buckets, program_of
from avocado_jax.planning.report import report
from avocado_jax.planning.work import batches as batches_of
from avocado_jax.planning.work import runs_per_step
from avocado_jax.train import run_grpo
from avocado_jax.train.grpo import GrpoProgram

FIELDS = ["--nominal.model", "tiny", "--nominal.clip", "256,2,1,1", "--sampling.tokens", "16"]
SMALL = 4096  # bytes of a device for a batch: advantages, rewards, banned ids


def make_plan(*fields):
    config = load("configs/grpo_7b.py", [*FIELDS, "--rollout_batches", "1", *fields])
    model, (bucket,) = model_and_buckets(config)
    return program_of(config, model, bucket, jax.devices())


@pytest.fixture(scope="module")
def plan():
    return make_plan()


def allocate(shapes):
    """Arrays of these shapes and shardings."""
    return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes)


def test_resident_arrays_of_other_phases_count(plan):
    (phase,) = (phase for phase in plan.phases if phase.name == "view")
    other = {**phase.alive, "other": plan.phases[-1].alive["parameters"]}
    alone, beside = (report(plan, one)["hbm_bytes"] for one in (phase, phase._replace(alive=other)))
    assert beside["total"] - alone["total"] == beside["other"] == alone["parameters"] > 0


def test_slots_of_held_out_clips_fit_beside_a_step(plan):
    """The caches of 64 clips, sharded over the devices that divide the rows of a step."""
    held_out = make_plan("--data.heldout", "heldout", "--eval_tokens", "8")
    phases, before = ({phase.name: phase for phase in one.phases} for one in (held_out, plan))
    assert phases["encode"].alive.keys() - before["encode"].alive.keys() >= {"slots", "view"}
    text, shards = held_out.model.text, len(jax.devices()) // held_out.mesh.shape["tensor"]
    token = 2 * text.layers * text.kv_heads * text.head * 2  # bytes in bf16; two key heads are not divided by four
    caches = bytes_per_device(phases["encode"].alive["slots"][:2])
    assert 64 // shards * (256 + 16) * token <= caches <= 64 // shards * ((256 + 16) * token + 300)
    assert phases["update"].alive.keys() == before["update"].alive.keys()


@pytest.mark.parametrize(("steps", "spares"), [(1, 0), (3, 0), (2, 1)])
def test_memory_of_a_step_equals_its_plan(steps, spares, tmp_path, capsys):
    """The step of a run with fake phases, which allocate the real results and measure the live arrays."""
    together, fields = steps + spares, ["--rollout_batches", str(steps), "--oversample", str(8 * spares)]
    plan = make_plan(*fields, "--objective.importance_cap", "2")
    phases = {phase.name: phase for phase in plan.phases}
    runs = {"encode": together / steps, "view": 1 / steps, "rollout": 1 / steps}
    assert {name: runs_per_step(plan, phase) for name, phase in phases.items()} == dict.fromkeys(phases, 1.0) | runs
    assert batches_of(plan, phases["rollout"]) == together  # including spare batches
    alive = phases["rollout"].alive | phases["update"].alive
    rollout, scored = alive["captions"][1][0], phases["update"].args[1].scored
    before, measured = bytes_per_device(jax.live_arrays()), {}

    def phase(name, returned):
        def run(*args):
            measured[name] = bytes_per_device(jax.live_arrays()) - before
            return returned(*args)

        return run

    program = GrpoProgram(
        sampler=None,
        sampler_mesh=None,
        state=None,
        reference=None,
        begin=None,
        encode=phase("encode", lambda *_: allocate(alive["encoded"][0])),
        view=phase("view", lambda *_: allocate(alive["view"])),
        roll_out=phase("rollout", lambda *_: tuple(allocate(rollout) for _ in range(together))),
        score=phase("score", lambda *_: allocate(scored)),
        update=phase("update", lambda state, experience: (state, {"sampler_gap": np.float32(0.3)})),
    )
    rewards = SimpleNamespace(
        judge=lambda *_: lambda: None,
        terms=lambda rollout, *_: {"length": rollout.lengths.astype("float32")},
        combine=lambda terms, _: (terms["length"], {}),
        check=lambda judged: None,
    )
    *batches, waiting = (allocate(batch) for batch in alive["inputs"])
    empty = Batch(**dict.fromkeys(Batch._fields))._replace(records=(), following=(), spares=())
    named = [
        empty._replace(step=step, **dict(zip(("clip", "captions", "weight", "truncated"), one)))
        for step, one in enumerate(batches)
    ]
    del batches
    state, reference = allocate(phases["update"].args[0]), allocate(alive["reference"])
    if steps > 1:
        state = state._replace(rollouts=tuple(allocate(rollout) for _ in range(together)))
    batch = named[0]._replace(following=tuple(named[1:steps]), spares=tuple(named[steps:]))
    del named
    with jax.set_mesh(plan.mesh):
        batches = SimpleNamespace(
            step=lambda _: SimpleNamespace(records=[-1] * plan.config.batch),
            position=lambda step: step,
            spare_positions=lambda _: range(spares),
        )
        setup = SimpleNamespace(mesh=plan.mesh, plan=batches)
        step, _ = run_grpo._step(plan.config, setup, program, rewards, reference, None, (), str(tmp_path))
        _, _, finish = step(state, batch)
        finish()
    warned = "step 1: warning: sampler_gap 0.300" in capsys.readouterr().err
    assert warned == (spares == 0)  # all captions have the same reward, so no group is used
    del waiting
    assert list(measured) == [name for name in phases if name != "spares"]  # made by the step itself
    for name, measured_bytes in measured.items():
        assert abs(measured_bytes - bytes_per_device(phases[name].alive)) < SMALL * together, name
    # temporaries are larger than the tolerance
    assert min(bytes_per_device(alive[part]) for part in ("encoded", "view", "reference")) > 2 * SMALL * together
