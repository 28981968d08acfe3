"""The measuring code of `bench`: ceilings, a result's figures, and the cycle of captioning."""

import argparse
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from avocado_jax.bench import caption, grpo, measure
from avocado_jax.bench.measure import Ceilings
from avocado_jax.cli import bench as command
from avocado_jax.errors import InputError
from avocado_jax.models.config import SIZES, TINY
from avocado_jax.models.flops import decode_bytes, row_flops, text_layer_parameters
from avocado_jax.train.grpo import check_grpo


def test_the_time_is_the_median_after_compilation(monkeypatch):
    clock, durations = [0.0], iter([100.0, 1.0, 7.0, 2.0])

    def run():
        clock[0] += next(durations)
        return np.zeros(1)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure.seconds_of(run) == 2.0
    assert next(durations, None) is None


@pytest.mark.parametrize(("copy", "total", "moved"), [(0.5, 0.5, 2 * 2**26 / 0.5), (0.5, 0.125, 2**26 / 0.125)])
def test_ceilings_count_the_work_that_runs(monkeypatch, copy, total, moved):
    """A product of two matrices of 1024 x 1024, a copy of 64 MiB and its sum."""

    def seconds_of(run):
        result = run()
        assert result.dtype == ("bfloat16" if result.ndim == 2 else "float32")
        if result.ndim == 0:
            assert float(result) == 2**24
        return {(): total, (2**24,): copy, (1024, 1024): 0.25}[result.shape]

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert measure.ceilings("bfloat16") == Ceilings(2 * 1024**3 / 0.25, moved)


def test_the_figures_of_a_result(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda dtype: Ceilings({"float32": 8e12}[dtype], 1e11))
    found = measure.row("sft", "tiny", 2.0, 4, 10, 6e12, 8e9, "float32")
    expected = {"step_ms": 500, "tokens_per_second": 5, "tflops": 3, "mfu": 0.375, "bytes_per_second": 4e9}
    assert {name: found[name] for name in expected} == expected
    assert (found["ceiling_tflops"], found["ceiling_bytes_per_second"]) == (8, 1e11)


def test_the_cycle_of_captioning(monkeypatch):
    """Three slots over two dispatches: each clip is prefilled once, and all steps are decoded in windows that grow."""
    slots, clip, length = 3, 256, caption.programs.STEPS + 4
    config = replace(  # one layer of each kind: quick to compile
        TINY,
        audio=replace(TINY.audio, layers=1),
        vision=replace(TINY.vision, layers=1, full_layers=(0,)),
        text=replace(TINY.text, layers=1),
    )
    monkeypatch.setitem(SIZES, "tiny", config)
    calls = []
    for name in ("admit", "advance"):
        real = getattr(caption.programs, name)
        monkeypatch.setattr(
            caption.programs, name, lambda *a, name=name, real=real: (calls.append((name, a)), real(*a))[1]
        )
    ticks = count()
    monkeypatch.setattr(caption.time, "perf_counter", lambda: (calls.append(("time", ())), float(next(ticks)))[1])
    monkeypatch.setattr(measure, "ceilings", lambda dtype: Ceilings(1e12, 1e11))
    found = caption.bench_caption("tiny", slots, clip, length, "float32")
    names = [name for name, _ in calls]
    assert names == ["admit", "advance", "time", "admit", "advance", "admit", "admit", "advance", "time"]
    measured = calls[names.index("time") :]
    assert [int(a[6][0, 0]) for name, a in measured if name == "admit"] == [0, 1, 2]

    sizes = caption.random_clip(config, clip, caption.FRAMES["tiny"])
    shape = (clip, *sizes.patches.shape[1:3], sizes.mel.shape[1])
    flops = slots * row_flops(config, shape, 1, length).total  # of a clip with its caption, in one pass
    weights = decode_bytes(config, 0, 0, 0, 4)
    nbytes = length * (weights + slots * (decode_bytes(config, clip, 1, length / 2, 4) - weights))
    assert found["seconds"] == 1.0
    assert found["tflops"] == pytest.approx(flops / 1e12)
    assert found["bytes_per_second"] == pytest.approx(nbytes)
    assert (found["clips_per_second"], found["tokens_per_second"]) == (slots, slots * length)
    prefill = slots * row_flops(config, shape, 0, 0).total
    assert found["floor_seconds"] == pytest.approx(prefill / 1e12 + nbytes / 1e11)


@pytest.mark.parametrize(("batches", "int8"), [(1, False), (4, False), (1, True), (4, True)])
def test_the_share_of_a_rollout_in_an_update(monkeypatch, batches, int8):
    """Each phase takes known seconds: a rollout is divided by its batches, and all of them are sampled together."""
    clock, configs, group, length = [0.0], [], 2, 8

    def takes(seconds, result):
        def run(*args):
            clock[0] += seconds(*args) if callable(seconds) else seconds
            return result

        return run

    def sampling(view, clips, encoded, step, banned):
        assert (len(clips), len(encoded)) == (batches, batches)
        return 10.0 if banned[0] else 2.0  # without a stop, or with nothing else

    state = SimpleNamespace(params={})
    metrics = {"loss": 0.0, "sampler_gap": 0.5, "length": length}
    program = SimpleNamespace(
        state=state,
        reference={},
        begin=takes(0, state),
        encode=takes(1.0, "encoded"),
        view=takes(3.0, "view"),
        roll_out=takes(sampling, (SimpleNamespace(captions="captions"),) * batches),
        score=takes(4.0, "scored"),
        update=takes(5.0, (state, metrics)),
    )

    def made(config, *_):
        check_grpo(config)
        configs.append(config)
        return program

    monkeypatch.setattr(grpo, "grpo_program", made)
    monkeypatch.setattr(grpo.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure, "ceilings", lambda dtype: Ceilings(1e12, 1e11))
    found = grpo.bench_grpo("tiny", group, 1024, length, "float32", "full", "captioner", batches, int8)
    (config,) = configs
    assert (config.rollout_batches, config.rollout_int8) == (batches, int8)
    assert found["seconds"] == pytest.approx(1 + (3 + 2 + 8) / batches + 4 + 5)
    assert found["decode_tokens_per_second"] == batches * config.batch * group * length / 8
    weights = decode_bytes(TINY, 0, 0, 0, 4) - 3 * int8 * TINY.text.layers * text_layer_parameters(TINY)
    caches = decode_bytes(TINY, batches * 1024, batches * group, length / 2, 4) - decode_bytes(TINY, 0, 0, 0, 4)
    assert found["decode_bytes_per_second"] == pytest.approx(length * (weights + caches) / 8)


def test_options_of_the_command_reach_the_step(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "bench_grpo", lambda *args: calls.append(args) or {"what": "grpo"})
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = "--group 3 --clip-tokens 2048 --caption-tokens 9 --dtype bfloat16 --remat dots --train lora"
    for more, expected in (("", (1, False)), ("--rollout-batches 4 --rollout-int8", (4, True))):
        assert command.run(parser.parse_args(["grpo", "--size", "tiny", *options.split(), *more.split()])) == 0
        assert calls.pop() == ("tiny", 3, 2048, 9, "bfloat16", "dots", "lora", *expected)
    with pytest.raises(InputError, match="--rollout-batches"):
        command.run(parser.parse_args(["grpo", "--rollout-batches", "0"]))
