"""Parameters onto devices, from either kind of folder, in the layout that decoding wants."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.checkpoint.hf import HfCheckpoint, is_hf, open_hf
from avocado_jax.checkpoint.orbax import RunCheckpoint, is_run, open_run
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

Checkpoint = HfCheckpoint | RunCheckpoint  # both read one parameter, or one layer of it, at a time


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Open a folder in Hugging Face format, or a run, here or gs:// (its newest finished step).

    Raises:
        InputError: neither, or not sound.
    """
    if is_run(folder):
        return open_run(folder)
    if str(folder).startswith("gs://"):
        raise InputError(f"{folder}: not a run folder")
    folder = Path(folder)
    if is_hf(folder):
        return open_hf(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    raise InputError(f"{folder}: neither a checkpoint in Hugging Face format nor a run folder")


def load_params(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Every parameter on the default device in `dtype`, layers apart (`ThinkerConfig.scan` false)."""
    params: dict[str, Any] = {}
    for entry in progress(list(checkpoint.entries.values()), "loading tensors"):
        node = params
        for key in entry.path[:-1]:
            name = key if key != "layers" else f"layers_{entry.layer}"
            node = node.setdefault(name, {})
        node[entry.path[-1]] = jax.device_put(checkpoint.read(entry).astype(jnp.dtype(dtype)))
    return params
