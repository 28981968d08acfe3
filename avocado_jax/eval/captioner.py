"""Load a captioner from a checkpoint: parameters, tokenizer, stop ids and clip sampling."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import Checkpoint, load_params
from avocado_jax.data.media import load_reading
from avocado_jax.data.prompt import PROMPTS, load_habits
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.models.thinker import init
from avocado_jax.parallel.backend import use_exact_fp32
from avocado_jax.parallel.compiled import use_user_cache
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.programs import bound_compiled_programs
from avocado_jax.parallel.rules import shardings
from avocado_jax.sampling.captioner import Captioner, captioner_of

PARAMETERS = 0.5  # maximum share of a device's memory for parameters; the rest is for caches and prefill
QUESTION = "question.txt"  # file of a checkpoint's folder with the only question of its training


def load_captioner(
    checkpoint: Checkpoint, text: str | None, dtype: str, mesh: tuple[int, int] | None = None
) -> Captioner:
    """Load an opened checkpoint onto the local devices. Compiled programs are cached in the user's cache folder.

    Args:
        text: the question; None: the checkpoint's question (`question.txt` in its folder), else AVoCaDO's first one.
        dtype: compute dtype.
        mesh: (data replicas, devices per replica); None: replicas of the fewest devices that fit the parameters.

    Raises:
        InputError: see `open_captioner`; or the mesh is larger than the number of devices.
    """
    bound_compiled_programs()
    use_user_cache()
    made = open_captioner(checkpoint, text, dtype)
    shapes = parameter_shapes(made.config)
    placed = captioning_mesh(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)), mesh)
    return made._replace(params=load_params(checkpoint, dtype, placed and shardings(shapes, placed, over=("tensor",))))


def parameter_shapes(config: ThinkerConfig) -> Any:
    """The shapes of a model's parameters."""
    return jax.eval_shape(partial(init, config), jax.random.key(0))


def open_captioner(checkpoint: Checkpoint, text: str | None, dtype: str) -> Captioner:
    """The captioner of an opened checkpoint without parameters, for building rows of clips.

    Raises:
        InputError: the checkpoint has no tokenizer, no stop ids, or a tokenizer with another vocabulary.
    """
    folder = checkpoint.config_folder
    tokenizer = load_words(folder)
    config = computed(checkpoint.config, dtype, scan=False)
    stops = stop_ids(folder, tokenizer, config.text.vocab)
    reading, habits = load_reading(folder), load_habits(folder)
    if text is None:
        question = folder / QUESTION
        text = habits.prompt or (question.read_text(encoding="utf-8").strip() if question.is_file() else PROMPTS[0])
    try:
        return captioner_of(config, {}, tokenizer, stops, text, reading, habits)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def captioning_mesh(size: int, sizes: tuple[int, int] | None = None) -> Mesh | None:
    """The mesh of the local devices for parameters of `size` bytes; None for a single device.

    Args:
        sizes: (data, tensor); None: the smallest `tensor` for which parameters take at most half of a device's memory.

    Raises:
        InputError: the mesh is larger than the number of devices.
    """
    devices = jax.local_devices()
    if sizes is None and devices[0].platform == "cpu":  # CPU devices share the cores of the machine
        return None
    if sizes is None:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit") or float("inf")
        tensor = fewest_devices(size, len(devices), limit)
        sizes = len(devices) // tensor, tensor
    if sizes[0] * sizes[1] > len(devices):
        raise InputError(f"--mesh {sizes[0]},{sizes[1]}: there are {len(devices)} devices")
    if sizes == (1, 1):
        return None
    return make_mesh(sizes[0], 1, sizes[1], devices=devices[: sizes[0] * sizes[1]])


def fewest_devices(size: int, count: int, limit: float) -> int:
    """The fewest of `count` devices of `limit` bytes that fit parameters of `size` bytes in half of their memory."""
    powers = [1 << power for power in range(count.bit_length()) if count % (1 << power) == 0]
    return next((tensor for tensor in powers if size / tensor <= PARAMETERS * limit), powers[-1])


def computing_dtype(name: str | None) -> str:
    """The compute dtype: `name`, else bfloat16 on accelerators and float32 on CPU. Configures exact fp32 products."""
    dtype = name or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    use_exact_fp32(dtype)
    return dtype
