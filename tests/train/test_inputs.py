"""Records from AVWorld's generator, and the rate of the input."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import tiny_run

from avocado_jax.config import DataConfig, SftConfig
from avocado_jax.data.index import byte_length
from avocado_jax.errors import InputError
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import inputs, loop, run
from avocado_jax.train.inputs import MOST_WORKERS, MUTED, WARM_UP, WINDOW, InputMonitor, input_workers, open_source


def test_mixed_source_has_silent_clips_with_silent_captions():
    plain, _ = open_source("world:0:train:3:24:plain", DataConfig())
    mixed, _ = open_source("world:0:train:3:24:mixed", DataConfig())
    for number in (0, 1, MUTED):
        audible, record = plain[number], mixed[number]
        silent = number % MUTED == 0
        assert (record.clip.samples is None) == silent
        np.testing.assert_array_equal(record.clip.frames, audible.clip.frames)
        assert (mixed.index.mel[number] == 0) == silent
        if silent:
            assert '"' in audible.fields["caption"]
            quoted = [value for value in record.fields.values() if '"' in str(value)]
            assert not quoted  # nowhere, references included
            assert byte_length(record.fields["caption"]) == mixed.index.caption[number]
        else:
            assert record.fields == audible.fields
            assert mixed.index.mel[number] == plain.index.mel[number]


def test_number_of_input_processes_follows_the_host(monkeypatch):
    """-1 is a share of the cores on accelerators, and none on CPU, where the step needs them."""
    config = DataConfig()
    assert config.workers == -1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert input_workers(config.workers) == 0
    monkeypatch.setattr(inputs.jax, "default_backend", lambda: "tpu")
    assert input_workers(config.workers) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(208))
    assert input_workers(config.workers) == MOST_WORKERS
    assert [input_workers(count) for count in (0, 3)] == [0, 3]
    with pytest.raises(InputError, match="-2"):
        input_workers(-2)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert input_workers(-1) == 5


def test_run_starts_that_many_input_processes(monkeypatch):
    started = []
    monkeypatch.setattr(run, "batches", lambda *arguments: started.append(arguments[6:]))
    monkeypatch.setattr(inputs.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(run, "agreed_batches", lambda *_: None)
    setup = run.Setup(*[None] * len(run.Setup._fields))
    setup = setup._replace(mesh=make_mesh(1, -1, 1), plan=SimpleNamespace(batch=8, position=lambda step: step), split=1)
    for workers in (-1, 3):
        run.stream(setup, SftConfig(data=DataConfig(workers=workers, threads=5)), 0)
    assert started == [(4, 5), (3, 5)]


def steps(monitor, clock, waited, count):
    for _ in range(count):
        clock.now += 1.0
        monitor.step(waited, 8)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(inputs.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_slow_input_is_reported_once(clock, capsys):
    monitor = InputMonitor()
    steps(monitor, clock, 0.9, WARM_UP + WINDOW - 1)
    assert capsys.readouterr().err == ""
    steps(monitor, clock, 0.9, 1)
    message = capsys.readouterr().err
    assert f"the last {WINDOW} steps waited for input 90% of the time, which gives 8.00 rows/s" in message
    assert "data.workers" in message
    steps(monitor, clock, 0.9, 2 * WINDOW)
    assert capsys.readouterr().err == ""


def test_the_loop_measures_its_input(monkeypatch):
    measured = []

    class Monitor:
        def step(self, waited, rows):
            measured.append((waited >= 0, rows))

    monkeypatch.setattr(loop, "InputMonitor", Monitor)
    tiny_run()
    assert measured == [(True, 2)] * 4


def test_fast_input_is_not_reported_until_it_becomes_slow(clock, capsys):
    monitor = InputMonitor()
    steps(monitor, clock, 60.0, WARM_UP)  # it starts
    steps(monitor, clock, 0.1, 2 * WINDOW)
    assert capsys.readouterr().err == ""
    steps(monitor, clock, 0.5, WINDOW)
    assert "waited for input 50% of the time" in capsys.readouterr().err
