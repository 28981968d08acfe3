"""Attention kernels for training and prefill, by platform: three modules with the same functions.

`attend_clip`, `attend_captions` and `attend_block` of `plain`, `splash` (TPU) and `cudnn` (GPU) are equivalent.
"""

import importlib
from functools import partial
from types import ModuleType, SimpleNamespace

import jax

from avocado_jax.models.config import Kernel

MIN_KERNEL_BLOCK = 512  # slots; shorter blocks of the encoders use plain attention


FUNCTIONS = ("attend_clip", "attend_captions", "attend_block")


def backend(kernel: Kernel, dtype: str, block: int | None = None) -> ModuleType | SimpleNamespace:
    """The functions of the kernel that `ThinkerConfig` selects for activations of `dtype`.

    "auto" selects the kernel of jax's default platform, if it supports the dtype. Programs for another platform (`plan`
    compiles for TPU on machines without one) must name the kernel.

    Args:
        block: slots of an encoder's block; short blocks use "plain" on every platform.
    """
    attention = kernel.name
    if attention == "auto":
        half = dtype in ("bfloat16", "float16")
        attention = {"tpu": "splash", "gpu": "cudnn" if half else "plain"}.get(jax.default_backend(), "plain")
    if block is not None and block < MIN_KERNEL_BLOCK:
        attention = "plain"
    # Imported on demand, so that other platforms do not need the kernel's dependencies.
    module = importlib.import_module(f"avocado_jax.models.attention.{attention}")
    if attention != "splash":
        return module
    return SimpleNamespace(**{name: partial(getattr(module, name), blocks=kernel.blocks) for name in FUNCTIONS})
