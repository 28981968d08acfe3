"""The compile cache of a run, and the programs that are compiled before step 1."""

import logging
import re
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gcs import storage_server
from jax.sharding import NamedSharding, PartitionSpec
from processes import run_connected

from avocado_jax.config import SftConfig, load
from avocado_jax.parallel import compiled
from avocado_jax.parallel.compiled import Program, compile_ahead, counts
from avocado_jax.train import run
from avocado_jax.train.rollout import smallest_width, widths

CACHED = """
import sys
import jax, jax.numpy as jnp
from avocado_jax.parallel.compiled import counts, use_cache

use_cache(sys.argv[1])
jax.jit(lambda x: x @ x + 1)(jnp.ones((8, 8))).block_until_ready()
print(counts().compiled, counts().read, jax.config.jax_compilation_cache_dir)
"""


def test_second_start_compiles_nothing(tmp_path, monkeypatch):
    """Counted by jax's events. The cache folder is in the run, unless the user sets one."""
    (first,) = run_connected(CACHED, 1, 1, tmp_path)
    count, read, where = first.split()
    assert int(count) > 0 == int(read)
    assert where == f"{tmp_path}/compiled"
    (second,) = run_connected(CACHED, 1, 1, tmp_path)
    assert second.split()[:2] == ["0", count]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    (third,) = run_connected(CACHED, 1, 1, tmp_path)
    assert third.split() == [count, "0", str(tmp_path / "mine")]


@pytest.fixture
def sharding():
    return NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())


GLOBAL = """
import os
import numpy as np
from jax._src import cache_key
from jax.sharding import NamedSharding, PartitionSpec
from avocado_jax.parallel.compiled import counts, use_cache

# The fingerprint of a CPU client differs between the processes of a job, and with it every key. On TPU it does not.
cache_key._hash_accelerator_config = cache_key._hash_devices
use_cache(sys.argv[1])
mesh = jax.make_mesh((4,), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))
batch = jax.make_array_from_process_local_data(rows, np.ones((2, 8), np.float32))
run = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
print(run(batch).item(), counts().compiled, counts().read)
jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
print(counts().compiled, counts().read)
"""


@pytest.mark.slow
def test_all_processes_read_the_cache_that_process_0_wrote_to_a_bucket(tmp_path, monkeypatch):
    """Programs for all devices. The key of a single-device program contains the device, and only process 0 writes."""
    (tmp_path / "bucket").mkdir()
    with storage_server(tmp_path) as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        first = run_connected(GLOBAL, 2, 2, "gs://bucket/run")
        second = run_connected(GLOBAL, 2, 2, "gs://bucket/run")
    assert first[0].split()[-5:] == ["32.0", "1", "0", "2", "0"]  # process 1 may read what process 0 has just written
    assert [output.split()[-5:] for output in second] == [["32.0", "0", "1", "0", "2"], ["32.0", "0", "1", "1", "1"]]


def compiled_or_cached():
    """Programs that this process compiled or read from the test processes' cache."""
    return counts().compiled + counts().read


def test_calls_reuse_programs_compiled_ahead(sharding, capsys):
    run = jax.jit(lambda x, n: jnp.sin(x) * n, static_argnums=1, donate_argnums=0, out_shardings=sharding)
    shapes = [jax.ShapeDtypeStruct((size, 3), jnp.float32, sharding=sharding) for size in (2, 4)]
    before = compiled_or_cached()
    compile_ahead([Program("one", run, (shape, 3)) for shape in shapes])
    assert compiled_or_cached() == before + 2
    assert "compiled 2 of 2 programs" in capsys.readouterr().err
    batches = [jax.device_put(jnp.ones(shape.shape), sharding) for shape in shapes]
    before = compiled_or_cached()
    for batch in batches:
        run(batch, 3)
    assert compiled_or_cached() == before


@pytest.fixture
def compilation_log():
    log = compiled.CompilationLog()
    yield log
    jax.monitoring.unregister_event_duration_listener(log._log)
    logging.getLogger("jax._src.interpreters.pxla").removeFilter(log)


def test_a_slow_compilation_is_logged_with_its_shapes(compilation_log, monkeypatch, capsys, caplog):
    def later(*arrays):
        return sum(array.sum() for array in arrays)

    arrays = [np.ones((3, 5), np.float32), np.int32(2)]
    monkeypatch.setattr(compiled, "LOGGED_SECONDS", 0.0)
    jax.jit(later)(*arrays)
    line = r"compiled during the run, in \d+\.\d s: jit\(later\)\({}f32\[3,5\], i32\[\]\)\n"
    assert re.fullmatch(line.format(""), capsys.readouterr().err)
    monkeypatch.setattr(compiled, "LOGGED_SHAPES", 2)
    jax.jit(later)(np.ones(1), np.ones(2), *arrays)
    assert re.fullmatch(line.format("2 arrays, "), capsys.readouterr().err)
    monkeypatch.undo()
    jax.jit(later)(np.ones(7))  # takes less than a second
    assert not capsys.readouterr().err
    assert not caplog.records  # the debug log of jax is not printed


def test_compilations_are_logged_once_the_programs_are_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(run, "remaining_buckets", lambda *_: ["bucket"])
    monkeypatch.setattr(run, "compile_ahead", lambda _: calls.append("ahead"))
    monkeypatch.setattr(run, "log_compilations", lambda: calls.append("log"))
    monkeypatch.setattr(run, "Log", lambda *_: None)
    monkeypatch.setattr(run, "train", lambda *_: calls.append("train") or 0)
    setup = SimpleNamespace(steps=1, plan=SimpleNamespace(digest=""), mesh=None)
    stage = {"evaluator": run.Evaluator(), "step": None, "flops": None}
    assert run.run(SftConfig(), setup, "", None, SimpleNamespace(step=0), lambda _: [], **stage) == 0
    assert calls == ["ahead", "log", "train"]


def test_programs_compile_concurrently(sharding, monkeypatch):
    """Compilations overlap, at most THREADS of them."""
    both, running, most = threading.Barrier(2, timeout=60), [], []

    class Lowered:
        def compile(self):
            running.append(self)
            most.append(len(running))
            both.wait()
            running.remove(self)

    class Jitted:
        def lower(self, *_):
            return Lowered()

    monkeypatch.setattr(compiled, "THREADS", 2)
    monkeypatch.setattr(compiled.os, "cpu_count", lambda: 8)
    compile_ahead([Program("fake", Jitted(), ())] * 4)
    assert max(most) == 2


def test_program_that_fails_to_compile_is_named(monkeypatch):
    class Refused:
        def lower(self, *_):
            return self

        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as error:
        compile_ahead([Program("the update", Refused(), ())])
    assert error.value.__notes__ == ["in the compilation of the update"]


def test_widths_of_caption_columns():
    assert widths(4096) == (2048, 4096)
    assert widths(25) == (13, 25)
    assert widths(1) == (1,)
    assert [smallest_width(longest, 4096) for longest in (1, 2048, 2049, 4096)] == [2048, 2048, 4096, 4096]


def test_number_of_programs_of_the_7b_run():
    """launch/README.md has the seconds: encode and rollout of each shape, score and update of each width, the view."""
    config = load("configs/grpo_7b.py")
    assert config.data.shapes * (2 + 2 * len(widths(config.sampling.tokens))) + 1 == 25


def test_commands_set_the_cache_before_they_train(tmp_path, monkeypatch):
    from avocado_jax.cli import grpo, sft
    from avocado_jax.train import run, run_grpo

    for command, module, config in ((sft, run, "SftConfig"), (grpo, run_grpo, "GrpoConfig")):
        calls = []
        monkeypatch.setattr(compiled, "use_cache", lambda folder, calls=calls: calls.append(folder))
        name = command.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, lambda config, folder, calls=calls: calls.append("train") or 0)
        (tmp_path / "c.py").write_text(f"from avocado_jax.config import {config}\nconfig = {config}()\n")
        from avocado_jax.__main__ import main

        monkeypatch.setattr("sys.argv", ["avocado", name, str(tmp_path / "c.py"), "--workdir", "run"])
        assert main() == 0
        assert calls == ["run", "train"]
