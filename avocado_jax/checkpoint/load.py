"""Parameters onto devices, from either kind of folder, in the layout that decoding wants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.checkpoint.hf import HfCheckpoint, is_hf, open_hf
from avocado_jax.checkpoint.orbax import RunCheckpoint, is_run, open_run
from avocado_jax.errors import InputError
from avocado_jax.progress import progress


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of either kind."""

    source: HfCheckpoint | RunCheckpoint
    side_files: Path  # folder of config.json, the tokenizer and generation settings


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder in Hugging Face format, or a run (its newest finished step).

    Raises:
        InputError: neither, or not sound.
    """
    if is_run(folder):
        return Checkpoint(open_run(folder), folder / "hf")
    if is_hf(folder):
        return Checkpoint(open_hf(folder), folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    raise InputError(f"{folder}: neither a checkpoint in Hugging Face format nor a run folder")


def load_params(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Every parameter on the default device in `dtype`, layers apart (`ThinkerConfig.scan` false)."""
    params: dict[str, Any] = {}
    for entry in progress(list(checkpoint.source.entries.values()), "loading tensors"):
        node = params
        for key in entry.path[:-1]:
            name = key if key != "layers" else f"layers_{entry.layer}"
            node = node.setdefault(name, {})
        node[entry.path[-1]] = jax.device_put(checkpoint.source.read(entry).astype(jnp.dtype(dtype)))
    return params
