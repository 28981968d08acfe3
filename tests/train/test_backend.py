"""Settings of XLA's backends: a GPU's memory, exact fp32 products, and references on the host's CPU."""

import os
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from train_runs import ONE_LAYER

from avocado_jax.__main__ import main
from avocado_jax.config import GrpoConfig, SftConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype
from avocado_jax.parallel import backend
from avocado_jax.parallel.backend import MEMORY, on_cpu, use_gpu_memory
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.planning.program import program_of
from avocado_jax.train import rewards as run_rewards
from avocado_jax.train import run
from avocado_jax.train.rewards import make_rewards


@pytest.fixture
def default_precision():
    yield
    jax.config.update("jax_default_matmul_precision", None)


def matmuls_of(lowered):
    """The matrix products of a lowered program."""
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp32_training_uses_exact_matmuls(dtype, default_precision):
    """`plan` lowers the step that a run compiles, with its gradient."""
    config = SftConfig(batch=1, steps=1, dtype=dtype, remat="none", attention="plain")
    model = run.model_of(config, ONE_LAYER)
    program = program_of(config, model, Bucket(Shape(128, 1, 1, 1), 64), jax.devices()[:1])
    found = matmuls_of(program.phases[0].lower(program.mesh))
    assert len(found) > 30
    exact = [line for line in found if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(exact) == (len(found) if dtype == "float32" else 0)


@pytest.mark.parametrize("begin", ["training", "evaluation"])
def test_training_and_evaluation_have_equal_precision(begin, default_precision):
    for dtype in ("bfloat16", "float32"):
        if begin == "evaluation":
            assert computing_dtype(dtype) == dtype
        else:
            with pytest.raises(InputError, match="init"):
                run.set_up(SftConfig(dtype=dtype, batch=jax.device_count()))
        found = matmuls_of(jax.jit(lambda a: a @ a).lower(np.ones((2, 2), np.float32)))
        assert ("HIGHEST" in found[0]) == (dtype == "float32")


def test_share_of_gpu_memory(monkeypatch):
    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    use_gpu_memory()
    assert os.environ.pop(MEMORY[0]) == "0.94"
    assert MEMORY[1] not in os.environ  # XLA refuses both together
    for name in MEMORY:
        monkeypatch.setenv(name, "0.5")
        use_gpu_memory()
        assert [os.environ.get(one) for one in MEMORY] == ["0.5" if one == name else None for one in MEMORY]
        monkeypatch.delenv(name)


@pytest.mark.parametrize("command", ["sft", "grpo", "ablate", "bench"])
def test_commands_set_gpu_memory_before_a_backend_starts(monkeypatch, tmp_path, command):
    class Reached(BaseException):
        pass

    def reached(*_, **__):
        raise Reached(os.environ.get(MEMORY[0]))

    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    first = {"ablate": "load", "bench": "jax.default_backend"}.get(command, "init_distributed")
    monkeypatch.setattr(f"avocado_jax.cli.{command}.{first}", reached)
    kind = "SftConfig" if command == "sft" else "GrpoConfig"
    (tmp_path / "c.py").write_text(f"from avocado_jax.config import {kind}\nconfig = {kind}()\n")
    where = ["--out", "x"] if command == "ablate" else ["--workdir", "x"]
    with pytest.raises(Reached, match=r"0\.94"):
        main(["bench", "decode"] if command == "bench" else [command, str(tmp_path / "c.py"), *where])
    monkeypatch.delenv(MEMORY[0])


def test_references_are_built_on_the_cpu(monkeypatch):
    """In the input thread, and in the main thread within a mesh. In this test the last device represents the CPU."""
    local, used = jax.local_devices, []
    cpu = jax.devices()[-1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, backend=None: [cpu] if backend == "cpu" else local())

    def make_references(table, *_):
        used.append(jax.jit(lambda x: x + 1)(np.ones(2)).devices())
        return table, None

    monkeypatch.setattr(run_rewards, "make_table", lambda *_: ())
    monkeypatch.setattr(run_rewards, "make_references", make_references)
    source = SimpleNamespace(index=SimpleNamespace(ids=[]))
    mesh = make_mesh(1, -1, 1)
    with jax.set_mesh(mesh):
        setup = SimpleNamespace(words=SimpleNamespace(json=None), source=source, mesh=mesh)
        rewards = make_rewards(GrpoConfig(), setup, (), {})
        rewards.references([{}])
        thread = threading.Thread(target=rewards.references, args=([{}],))
        thread.start()
        thread.join()
        assert jax.sharding.get_mesh() == mesh
    assert used == [{cpu}, {cpu}]


def test_without_a_cpu_backend_references_use_the_default_device(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(backend.jax, "local_devices", refuse)
    with on_cpu():
        assert jax.numpy.ones(2).sum() == 2
