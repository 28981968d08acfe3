"""Settings of XLA's backends for training, evaluation and `bench`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh

MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is deprecated; XLA rejects both


def use_gpu_memory() -> None:
    """Let XLA allocate 94% of a GPU's memory instead of 75%. Call this before any device is used.

    A no-op if the environment sets the fraction.
    """
    if not any(name in os.environ for name in MEMORY):
        os.environ[MEMORY[0]] = "0.94"


def use_exact_fp32(dtype: str) -> None:
    """Use fp32 precision for matrix products if `dtype` is "float32". Accelerators default to bf16 or TF32 inputs.

    A no-op for other dtypes. Applies to all later traces of this process.
    """
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run this thread's jitted functions on the host's CPU for the duration of the block, regardless of the outer mesh.

    A no-op if JAX_PLATFORMS excludes the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        yield
        return
    with jax.set_mesh(Mesh(np.array(cpu), ("cpu",))):
        yield
