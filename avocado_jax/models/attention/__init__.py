"""Attention of whole sequences, by platform: three modules with the same three functions.

`attend_clip`, `attend_captions` and `attend_block` of `plain`, `splash` (TPU) and `cudnn` (GPU) compute the same.
"""

import importlib
from types import ModuleType

import jax

WORTH = 512  # slots from which a block of a tower is worth a kernel


def backend(attention: str, dtype: str, block: int | None = None) -> ModuleType:
    """The module that `ThinkerConfig.attention` means for activations of `dtype`.

    "auto" is the kernel of the platform that jax uses by default, in the dtypes it takes; a program for another
    platform (`plan` compiles for a TPU on a machine without one) must name its own.

    Args:
        block: slots of a tower's block; short ones are plain everywhere.
    """
    if attention == "auto":
        half = dtype in ("bfloat16", "float16")
        attention = {"tpu": "splash", "gpu": "cudnn" if half else "plain"}.get(jax.default_backend(), "plain")
    if block is not None and block < WORTH:
        attention = "plain"
    # Imported where it is chosen: a kernel's machinery is of no use to other platforms.
    return importlib.import_module(f"avocado_jax.models.attention.{attention}")
