"""Attention of whole sequences, by platform: three modules with the same three functions.

`attend_clip`, `attend_captions` and `attend_block` of `plain`, `splash` (TPU) and `cudnn` (GPU) compute the same.
"""

import importlib
from functools import partial
from types import ModuleType, SimpleNamespace

import jax

from avocado_jax.models.config import Kernel

MIN_KERNEL_BLOCK = 512  # slots; shorter blocks of a tower use plain attention


FUNCTIONS = ("attend_clip", "attend_captions", "attend_block")


def backend(kernel: Kernel, dtype: str, block: int | None = None) -> ModuleType | SimpleNamespace:
    """The functions of the kernel that `ThinkerConfig` selects for activations of `dtype`.

    "auto" is the kernel of the platform that jax uses by default, in the dtypes it takes; a program for another
    platform (`plan` compiles for a TPU on a machine without one) must name its own.

    Args:
        block: slots of a tower's block; short ones are plain everywhere.
    """
    attention = kernel.name
    if attention == "auto":
        half = dtype in ("bfloat16", "float16")
        attention = {"tpu": "splash", "gpu": "cudnn" if half else "plain"}.get(jax.default_backend(), "plain")
    if block is not None and block < MIN_KERNEL_BLOCK:
        attention = "plain"
    # Imported on demand: other platforms need not load a kernel's dependencies.
    module = importlib.import_module(f"avocado_jax.models.attention.{attention}")
    if attention != "splash":
        return module
    return SimpleNamespace(**{name: partial(getattr(module, name), blocks=kernel.blocks) for name in FUNCTIONS})
