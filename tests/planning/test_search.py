"""The search over slices: estimates that compile nothing, against compiled programs and against each other."""

import json
from dataclasses import replace

import jax
import pytest

from avocado_jax.__main__ import main
from avocado_jax.config import load
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.models.config import SEVEN_B, TINY
from avocado_jax.parallel.chips import CHIPS, Chip
from avocado_jax.planning import search, work
from avocado_jax.planning.collectives import KINDS
from avocado_jax.planning.communication import sent_bytes
from avocado_jax.planning.program import devices_of, model_and_buckets, program_of
from avocado_jax.planning.ranking import cache_bytes, estimates, on_mesh, on_one_device, stored_bytes
from avocado_jax.planning.report import report
from avocado_jax.train.run import model_of
from avocado_jax.train.state import split

# Four layers and few words, so that layers decide what is sent.
SMALL = replace(TINY, text=replace(TINY.text, layers=4, vocab=512))
CHIP = Chip(flops=1e9, memory=2**30, bandwidth=1e8, links=float("inf"))
BUCKET = Bucket(Shape(1024, 2, 1, 1), 16)
GRPO = [
    *("--mesh.fsdp", "4", "--mesh.tensor", "2", "--split", "1", "--group", "2", "--dtype", "float32"),
    *("--sampling.tokens", "16", "--data.caption_tokens", "8", "--rollout_batches", "1"),
]
SFT = ["configs/world_tiny.py", "--nominal.model", "tiny", "--nominal.clip", "256,2,1,1", "--data.caption_tokens", "64"]


def grpo(*fields):
    config = load("configs/grpo_7b.py", [*GRPO, *fields])
    return config, model_of(config, SMALL)


@pytest.fixture(scope="module")
def compiled():
    """A program, reports of its phases, and its estimate, on chips whose links are no bound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, jax.devices()[0].device_kind, CHIP)
        config, model = grpo()
        program = program_of(config, model, BUCKET, jax.devices())
        steps = {phase.name: report(program, phase) for phase in program.phases}
        traced = on_mesh(on_one_device(config, model, BUCKET), config, model, jax.devices())
        return program, steps, estimates("cpu", traced, [config])[0]


def test_plan_has_every_phase_of_grpo(compiled):
    """Each is compiled, and all arrays on the devices count, whether it reads them or not."""
    program, steps, _ = compiled
    assert list(steps) == ["encode", "view", "rollout", "score", "update"]
    trained, _ = split(program.phases[0].alive["parameters"], "captioner")
    weights = sum(leaf.size for leaf in jax.tree.leaves(trained))
    for name, step in steps.items():
        hbm = step["hbm_bytes"]
        assert step["fits"]
        assert set(step["collective_bytes"]) == set(KINDS)
        assert step["bucket"] == dict(tokens=1024, patches=2, windows=1, chunks=1, captions=2, caption=16)
        assert hbm["total"] == sum(size for part, size in hbm.items() if part != "total")
        # Eight devices store shards, and some small leaves replicated: policy, two moments, reference in bf16.
        assert weights * (4 + 8 + 2) / 8 < hbm["parameters"] + hbm["optimizer"] + hbm["reference"]
        assert hbm["optimizer"] == pytest.approx(4 * hbm["reference"], abs=100)
        assert ("encoded" in hbm, "view" in hbm, "captions" in hbm) == {
            "encode": (False, False, False),
            "view": (True, False, False),
            "rollout": (True, True, False),
            "score": (True, False, True),
            "update": (True, False, True),
        }[name]
        assert (step["flops"] > 0) == (name != "view")
        assert (step["residual_bytes_estimate"] > 0) == (name == "update")


def test_estimated_communication_is_near_that_of_compiled_programs(compiled):
    """The CPU's compiler sums the gradients of q, k and v, and of gate and up, one by one; a TPU's adds them first."""
    program, steps, _ = compiled
    sent = {phase.name: sent_bytes(program, phase) for phase in program.phases}
    shares = {name: size / sum(steps[name]["collective_bytes"].values()) for name, size in sent.items()}
    assert 0.5 < shares.pop("update") < 1
    assert 0.8 < min(shares.values()) < max(shares.values()) < 1.1, shares


def test_estimated_time_equals_that_of_the_report(compiled, monkeypatch):
    program, steps, estimate = compiled
    assert estimate.seconds == pytest.approx(sum(one["seconds"] for one in steps.values()))
    assert estimate.chip_seconds == 8 * estimate.seconds
    bounds = [bound for one in steps.values() for bound in one["roofline_seconds"].values()]
    assert estimate.serial_seconds == pytest.approx(sum(bounds))
    monkeypatch.setattr(work, "runs_per_step", lambda program, phase: 3.0)  # a rollout of several batches: fewer
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, CHIP)
    (thrice,) = estimates("cpu", program, [program.config])
    assert thrice.seconds == pytest.approx(3 * estimate.seconds)
    assert thrice.serial_seconds == pytest.approx(3 * estimate.serial_seconds)


def test_least_memory_is_a_lower_bound(compiled):
    program, steps, estimate = compiled
    stored = {phase.name: stored_bytes(program, phase) + cache_bytes(program, phase) for phase in program.phases}
    least = {name: size + steps[name]["residual_bytes_estimate"] for name, size in stored.items()}
    assert all(size <= steps[name]["hbm_bytes"]["total"] for name, size in least.items())
    assert estimate.least_bytes == max(least.values())
    text, rows, tokens = SMALL.text, 8 / 4, 1024 + 2 * 16  # heads are over two devices
    caches = rows * tokens * 2 * text.layers * text.kv_heads * text.head * 4 / 2
    gradients = steps["update"]["hbm_bytes"]["optimizer"] / 2  # of two moments
    for phase in program.phases:
        more = stored[phase.name] - sum(steps[phase.name]["hbm_bytes"][part] for part in phase.alive)
        assert more == pytest.approx({"rollout": caches, "update": gradients}.get(phase.name, 0), abs=50)


@pytest.mark.parametrize(("fsdp", "tensor", "of_rollout"), [(8, 1, 4), (2, 4, 0)])
def test_shapes_moved_to_a_mesh_equal_those_of_the_program(fsdp, tensor, of_rollout):
    """They are those of the program: also held-out slots and spare clips, and axes that do not divide a size."""
    sizes = ["--mesh.fsdp", str(fsdp), "--mesh.tensor", str(tensor), "--mesh.rollout_tensor", str(of_rollout)]
    config, model = grpo("--oversample", "8", "--data.heldout", "heldout", *sizes)
    bucket = BUCKET._replace(shape=Shape(16, 1, 1, 1))
    found = on_mesh(on_one_device(config, model, bucket), config, model, jax.devices())
    program = program_of(config, model, bucket, jax.devices())
    assert found[:5] == program[:5]
    assert (found.mesh, found.hosts) == (program.mesh, program.hosts)
    assert "slots" in program.phases[0].alive

    def shards(phases):
        return [
            (leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape))
            for phase in phases
            for leaf in jax.tree.leaves((phase.alive, () if phase.name == "rollout" else phase.args))
        ]

    assert shards(found.phases) == shards(program.phases)


def test_slices_are_ranked_by_chip_seconds():
    """The paper's step: no compilation, and what is known of compiled ones (planning/README.md)."""
    config = load("configs/sft_7b.py")
    model, (bucket,) = model_and_buckets(config)
    slices = {name: devices_of(name) for name in ("v5e:2x4", "v6e:4x8", "v5p:4x4x4", "v6e:8x8")}
    ranking = search.rank(config, model, bucket, slices)
    assert [one.chip_seconds for one in ranking] == pytest.approx(sorted(one.chip_seconds for one in ranking), rel=1e-2)
    first = {one.topology: one for one in reversed(ranking)}
    assert first.keys() == {"v6e:4x8", "v5p:4x4x4", "v6e:8x8"}  # eight small chips have no room
    assert min(ranking, key=lambda one: one.seconds).topology == "v6e:8x8"
    assert first["v6e:4x8"].seconds > first["v5p:4x4x4"].seconds  # but on half as many chips
    assert ranking.index(first["v6e:4x8"]) < ranking.index(first["v5p:4x4x4"])
    best = first["v6e:8x8"]
    assert best.seconds == pytest.approx(9.34, abs=0.01)
    assert search.varied(best.config) == {
        **{"mesh.data": 1, "mesh.fsdp": 64, "mesh.tensor": 1},  # compute decides; more axes only send more
        **{"remat": "full", "accumulate": 1},
    }
    assert not any(one.config.remat == "dots" for one in ranking if one.topology == "v6e:8x8")  # 32 GiB
    recomputed = {one.config.remat: one.seconds for one in reversed(ranking) if one.topology == "v5p:4x4x4"}
    assert recomputed == pytest.approx({"dots": 15.86, "full": 18.67, "offload": 18.67}, abs=0.01)
    equal = [one.config.remat for one in ranking if one.topology == "v6e:8x8" and one.seconds == best.seconds]
    assert equal == sorted(equal)  # "offload" after "full"
    twice = next(one.config for one in ranking if one.topology == "v6e:8x8" and one.config.accumulate == 2)
    program = on_mesh(on_one_device(config, model, bucket), twice, model, slices["v6e:8x8"])
    assert sent_bytes(program, program.phases[0]) == pytest.approx(54.3e9 + 72.0e9, rel=0.1)


def test_choices_that_cannot_fit_are_left_out(monkeypatch):
    """Without ceilings the order is that of `candidates`. What cannot fit is left out."""
    config = load("configs/world_tiny.py", ["--nominal.model", "tiny"])
    model, bucket = model_of(config, TINY), Bucket(Shape(4096, 2, 1, 1), 64)
    tried = list(search.candidates(config, model, 8))
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in tried} == {(8, 1), (4, 2), (2, 4)}
    assert all(8 % (one.mesh.fsdp * one.accumulate) == 0 for one in tried)
    slices = {"here": jax.devices()}
    with pytest.raises(InputError, match="7 rows: no mesh of 8 devices divides them"):
        search.rank(replace(config, batch=7), model, bucket, slices)

    # Captions of a clip use as few rows as the chips allow: the clip is read once per row.
    first = next(search.candidates(load("configs/grpo_7b.py"), SEVEN_B, 64))
    assert (first.split, first.mesh.fsdp, first.mesh.tensor, first.accumulate) == (2, 16, 4, 1)

    sizes = {
        (one.mesh.tensor, one.mesh.rollout_tensor) for one in search.candidates(load("configs/grpo_7b.py"), SEVEN_B, 64)
    }
    assert sizes == {(1, 0), (1, 2), (1, 4), (2, 0), (2, 4), (4, 0)}  # 28 heads

    assert [one.config for one in search.rank(config, model, bucket, slices)] == tried
    monkeypatch.setattr(search, "memory_of", lambda device: 10 * 2**20)
    fewer = search.rank(config, model, bucket, slices)
    assert [one.config.remat for one in fewer[:2]] == ["full", "offload"]
    assert max(one.least_bytes for one in fewer) <= 10 * 2**20


def test_search_compiles_the_best_and_prints_those_that_fit(capsys, monkeypatch):
    """The compiled programs decide the order in the end."""
    compiled = []

    def fake(program, phase):
        compiled.append(
            (program.config.mesh.tensor, program.config.remat, program.config.accumulate, program.mesh.size)
        )
        number = len(compiled)
        hbm = {"parameters": 2**30, "temporaries": number * 2**30, "total": (1 + number) * 2**30}
        entry = {"name": phase.name, "hbm_bytes": hbm, "hbm_limit_bytes": 2**34, "residual_bytes_estimate": 0}
        return entry | {"fits": number != 2, "seconds": 1 / number}

    monkeypatch.setattr(search, "report", fake)
    assert main(["plan", *SFT, "--topology", "v6e:2x2,v5e:2x2", "--search", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["topology"] == "v6e:2x2,v5e:2x2"
    estimated = [
        (one["fields"]["mesh.tensor"], one["fields"]["remat"], one["fields"]["accumulate"], one["devices"])
        for one in plan["estimates"]
    ]
    assert compiled == estimated[:3]
    assert {one["topology"] for one in plan["estimates"]} == {"v6e:2x2", "v5e:2x2"}
    assert all(one["chip_seconds"] == 4 * one["seconds"] > 0 for one in plan["estimates"])
    assert [one["fields"] for one in plan["choices"]] == [plan["estimates"][number]["fields"] for number in (2, 0)]
    assert [one["chip_seconds"] for one in plan["choices"]] == pytest.approx([4 / 3, 4])
    assert [one["hbm_bytes"] for one in plan["choices"]] == [4 * 2**30, 2 * 2**30]

    compiled.clear()
    assert main(["plan", *SFT, "--topology", "v6e:2x2,v5e:2x2", "--search", "3"]) == 0
    printed = capsys.readouterr()
    _, *lines = printed.out.splitlines()
    assert [line.split()[:4] for line in lines] == [["1.33", "0.333", "4.0", "16"], ["4", "1", "2.0", "16"]]
    arguments = " ".join(f"--{name} {value}" for name, value in plan["choices"][0]["fields"].items())
    assert lines[0].endswith(f"  --topology {plan['choices'][0]['topology']} {arguments}")
    assert printed.err.index(arguments) < printed.err.index("does not fit: 3.00 of 16.00 GiB")


def test_search_0_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(search, "report", None)
    monkeypatch.setattr(
        "avocado_jax.planning.report.memory_of", lambda device: 0 if "v5 lite" in device.device_kind else 2**40
    )
    monkeypatch.setattr(search, "memory_of", lambda device: 0 if "v5 lite" in device.device_kind else 2**40)
    assert main(["plan", *SFT, "--topology", "v6e:2x4,v5e:2x2,v5p:2x2x1", "--search", "0"]) == 0
    heading, *lines, last = capsys.readouterr().out.splitlines()
    assert "chip-seconds" in heading
    best = [line.split("--topology ")[1].split()[0] for line in lines]
    assert sorted(best) == ["v5p:2x2x1", "v6e:2x4"]  # one line each
    costs = [float(line.split()[0]) for line in lines]
    assert costs == sorted(costs)
    assert last == "v5e:2x2: no choice fits"
    assert main(["plan", *SFT, "--topology", "v6e:2x4", "--search", "0"]) == 0
    _, *ten = capsys.readouterr().out.splitlines()
    assert len(ten) == 10
    assert ten[0] in lines
    assert main(["plan", *SFT, "--topology", "v5e:2x2", "--search", "0"]) == 1
