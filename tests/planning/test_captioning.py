"""The plan of captioning, and the estimate of a collection."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from avocado_jax.__main__ import main
from avocado_jax.bench.caption import bench_caption
from avocado_jax.cli import bench
from avocado_jax.data.rows import Shape
from avocado_jax.models.config import SEVEN_B, TINY, computed
from avocado_jax.models.flops import decoding_work, prefill_work, row_flops
from avocado_jax.parallel.chips import CHIPS, Chip
from avocado_jax.planning import estimate
from avocado_jax.planning.captioning import clip_seconds
from avocado_jax.planning.report import ATTAINED
from avocado_jax.sampling import engine
from avocado_jax.typing import Clip

CHIP = Chip(flops=1e12, memory=2**34, bandwidth=1e11, links=1e30)
TINY_SHAPE = Shape(256, 2, 1, 1)
LAYER = 3584 * 128 * (2 * 28 + 2 * 4) + 3 * 3584 * 18944
WEIGHTS = 2 * (28 * LAYER + 152064 * 3584)  # bytes in bf16
TOKEN = 28 * 2 * 4 * 128 * 2  # bytes of keys and values


def test_work_of_7b():
    """Each of four devices reads a quarter of the weights and caches; each of eight, a quarter of the caches."""
    model, shape = computed(SEVEN_B, "bfloat16", scan=False), Shape(16384, 30, 30, 15)
    for tensor, heads in ((1, 1), (4, 4), (8, 4)):
        assert prefill_work(model, shape, 2, tensor) == (row_flops(model, shape, 0, 0).total, WEIGHTS / tensor)
        flops, nbytes = decoding_work(model, shape, 640, 16, 2, tensor)
        assert nbytes == pytest.approx(WEIGHTS / tensor + 16 * TOKEN * (16384 + 320) / heads)
        attention = 28 * 4 * 28 * 128 * (16384 + 320)
        assert flops == pytest.approx(16 * (WEIGHTS + attention))  # two operations and two bytes a weight
    chip = CHIPS["TPU v5"]
    work, step = prefill_work(model, shape, 2, 4), decoding_work(model, shape, 640, 16, 2, 4)
    expected = (work.flops / 4 / chip.flops + 640 / 16 * step.bytes / chip.bandwidth) / ATTAINED
    assert clip_seconds(model, shape, 640, 16, chip, 4) == pytest.approx(expected)


def test_plan_of_captioning(capsys, monkeypatch):
    """Without communication, the compiled programs have the rate of the formula."""
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, CHIP)
    fields = ["--nominal.model", "tiny", "--nominal.clip", ",".join(map(str, TINY_SHAPE))]
    assert main(["plan", "configs/world_tiny.py", *fields, "--captions", "32", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in plan["steps"]] == ["prefill", "decoding"]
    assert plan["fits"]
    assert (plan["slots"], plan["mesh"]) == (engine.MOST_SLOTS * 8, {"data": 8, "tensor": 1})
    model = computed(TINY, "float32", scan=False)
    seconds = clip_seconds(model, TINY_SHAPE, 32, engine.MOST_SLOTS, CHIP)
    assert plan["clips_per_chip_hour"] == pytest.approx(3600 / seconds, rel=1e-3)
    hbm = plan["steps"][1]["hbm_bytes"]
    assert hbm["caches"] > engine.MOST_SLOTS * (256 + 32) * 2 * 2 * 2 * 32 * 4
    assert hbm["total"] == sum(hbm[part] for part in ("parameters", "caches", "inputs", "temporaries"))


@pytest.mark.parametrize(("batch", "slots"), [(None, engine.CPU_SLOTS), (8, 2)])
def test_estimate_of_a_collection(monkeypatch, batch, slots):
    """The mean over the clips that could be read; ceilings are measured where no data sheet has them."""
    monkeypatch.setattr(estimate, "ceilings", lambda dtype: SimpleNamespace(flops=1e12, bytes=1e11))
    times = iter([10.0, 10.5, 12.0, 13.0])
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(times)))

    def row(tokens, patches):
        clip = Clip(*[None] * len(Clip._fields))._replace(
            tokens=np.zeros(tokens), patches=np.zeros(patches), patch_valid=np.zeros(1), mel=np.zeros(0)
        )
        return SimpleNamespace(clip=clip)

    config = computed(TINY, "float32", scan=False)
    given = [(0, row(200, 4), 0), (1, ValueError(), 0), (2, row(100, 2), 0)]
    found = estimate.estimate_clips(config, given, 3, 32, batch, (4, 2))
    shapes = Shape(256, 4, 1, 0), Shape(128, 2, 1, 0)
    chip = CHIP._replace(links=float("inf"))
    seconds = np.mean([clip_seconds(config, shape, 32, slots, chip, 2) / 4 for shape in shapes])
    assert found == (2, 150.0, 32, pytest.approx(seconds), 2.0, 8)
    line = estimate.estimate_line(found._replace(device_seconds=0.5, read_seconds=0.1), 7200)
    assert "from 2 clips of 150 tokens on average and captions of 32" in line
    assert "7200 clips take 1 h, 900 clips per chip-hour" in line
    assert estimate.estimate_clips(config, given[1:2], 1, 32, batch, None) is None


@pytest.mark.slow
def test_bench_over_a_mesh():
    """All replicas caption; the lower bound is that of a device with half of the weights."""
    one, four = (bench_caption("tiny", 2, 1024, 8, "float32", mesh) for mesh in ((1, 1), (2, 2)))
    assert (one["devices"], four["devices"]) == (1, 4)
    for result, clips in ((one, 2), (four, 4)):
        assert result["clips_per_second"] == pytest.approx(clips / result["seconds"])
        assert result["tokens_per_second"] == pytest.approx(clips * 8 / result["seconds"])
    of_device = [each["tflops"] * each["seconds"] for each in (one, four)]
    assert of_device[0] == pytest.approx(2 * of_device[1])


def test_mesh_option_is_passed_to_bench(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "bench_caption", lambda *args: calls.append(args) or {})
    options = ["--slots", "3", "--clip-tokens", "1024", "--caption-tokens", "8", "--dtype", "bfloat16", "--json"]
    assert main(["bench", "caption", *options, "--mesh", "2,4"]) == 0
    assert calls == [("tiny", 3, 1024, 8, "bfloat16", (2, 4))]
    assert main(["bench", "caption", *options, "--mesh", "2"]) == 2
