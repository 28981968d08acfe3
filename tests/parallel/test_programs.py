"""Compiled programs are dropped before their memory maps run out."""

import threading

import jax
import jax.numpy as jnp
import pytest

from avocado_jax.config import SftConfig
from avocado_jax.errors import InputError
from avocado_jax.eval import captioner
from avocado_jax.parallel import programs
from avocado_jax.train import run


@pytest.fixture
def limited_maps(tmp_path, monkeypatch):
    """Set the limit so that programs are dropped after 300 more maps. Returns the number of maps at which they are."""
    limit = programs.memory_maps() + 300
    (tmp_path / "limit").write_text(str(2 * limit))
    monkeypatch.setattr(programs, "LIMIT", tmp_path / "limit")
    programs.bound_compiled_programs.cache_clear()
    before = jax._src.monitoring.get_event_duration_listeners()
    yield limit
    for listener in set(jax._src.monitoring.get_event_duration_listeners()) - set(before):
        jax.monitoring.unregister_event_duration_listener(listener)
    programs.bound_compiled_programs.cache_clear()


def test_maps_stay_bounded_and_results_right(limited_maps):
    inner = jax.jit(lambda x, k: jnp.sum(jnp.sin(x @ x)) + k, static_argnums=1)
    outer = jax.jit(lambda x: inner(x, 1) + inner(x, 2))
    programs.bound_compiled_programs()
    peaks, results = [], []

    def compile_many(thread):
        for number in range(40):
            size = 2 + number + 40 * thread
            results.append(float(outer(jnp.zeros((size, size)))) == 3)
            peaks.append(programs.memory_maps())

    threads = [threading.Thread(target=compile_many, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
    assert max(peaks) < limited_maps + 100  # unbounded: about 500 more (two programs of three maps for each size)


def test_training_and_captioning_bound_their_programs(monkeypatch):
    callers = []
    for module in (run, captioner):
        monkeypatch.setattr(module, "bound_compiled_programs", lambda module=module: callers.append(module))
    with pytest.raises(InputError, match="init: no checkpoint"):
        run.set_up(SftConfig())
    with pytest.raises(AttributeError):
        captioner.load_captioner(None, None, "float32")
    assert callers == [run, captioner]
