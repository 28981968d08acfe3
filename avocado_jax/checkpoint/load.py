"""Parameters onto devices, from either kind of folder, in the layout that decoding wants; the shipped checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.checkpoint.hf import HfCheckpoint, is_hf, open_hf
from avocado_jax.checkpoint.orbax import RunCheckpoint, is_run, open_run
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

SHIPPED = Path(__file__).parents[1] / "assets" / "captioner"
Checkpoint = HfCheckpoint | RunCheckpoint  # both read one parameter, or one layer of it, at a time


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder in Hugging Face format, or a run (its newest finished step).

    Raises:
        InputError: neither, or not sound.
    """
    if is_run(folder):
        return open_run(folder)
    if is_hf(folder):
        return open_hf(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    raise InputError(f"{folder}: neither a checkpoint in Hugging Face format nor a run folder")


def shipped_checkpoint() -> Path:
    """The folder of the small captioner that comes with this package.

    Raises:
        InputError: this copy of the package has none.
    """
    if not is_hf(SHIPPED):
        raise InputError("no checkpoint comes with this copy of the package: name one with --checkpoint DIR")
    return SHIPPED


def named_checkpoint(given: str | None) -> Checkpoint:
    """The checkpoint that a user names, or the shipped one.

    Raises:
        InputError: as `open_checkpoint`; or none is named and none is shipped.
    """
    return open_checkpoint(Path(given) if given else shipped_checkpoint())


def identity(checkpoint: Checkpoint) -> str:
    """A digest of what a checkpoint holds, wherever it lies: what was made with it can be told by it."""
    digest = hashlib.sha256()
    if isinstance(checkpoint, RunCheckpoint):  # Orbax names its files by random numbers: names tell the contents
        names = sorted(str(path.relative_to(checkpoint.params)) for path in checkpoint.params.rglob("*"))
        digest.update("\n".join(names).encode())
    whole = [path for path in checkpoint.side_files.iterdir() if path.suffix in (".json", ".safetensors")]
    for path in progress(sorted(whole), "reading the checkpoint's identity"):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
