"""Settings of XLA's backends that training, evaluation and `bench` share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh

MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is deprecated; XLA refuses both


def use_gpu_memory() -> None:
    """Let XLA allocate 94% of a GPU's memory instead of 75%. Call this before anything touches a device.

    A no-op where the environment sets the fraction.
    """
    if not any(name in os.environ for name in MEMORY):
        os.environ[MEMORY[0]] = "0.94"


def use_exact_fp32(dtype: str) -> None:
    """Compute in fp32 what `dtype` says is fp32: accelerators round the factors of products to bf16 or TF32 by default.

    A no-op for other dtypes. It applies to everything that this process traces from now on.
    """
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run jitted functions in the block on the host's CPU, in this thread, whatever mesh is in use around it.

    A no-op where JAX_PLATFORMS excludes the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        yield
        return
    with jax.set_mesh(Mesh(np.array(cpu), ("cpu",))):
        yield
