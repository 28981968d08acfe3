"""Write the start of the AVWorld captioner in Hugging Face format: random weights and a tokenizer of its words.

python launch/small_checkpoint.py DIR [--seed 0]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from avocado_jax.checkpoint.hf import UNUSED, table
from avocado_jax.checkpoint.hf_config import config_json, declare_dtype
from avocado_jax.checkpoint.safetensors import Spec, write_shards
from avocado_jax.data.prompt import PROMPTS, SYSTEM
from avocado_jax.data.tokenizer import train_tokenizer
from avocado_jax.models.config import SMALL
from avocado_jax.models.thinker import init
from avocado_jax.world import clip
from avocado_jax.world.caption import write_caption
from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, SPLITS

CLIPS = 150  # a level and a split, of seed 0: enough for all that AVWorld says to occur
QUESTIONS = 50  # times each prompt counts
EMBEDDING, BRANCH = 5.0, 0.5  # times the scale of `init`: words as loud as what attention adds; calmer branches


def main() -> int:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    fields = declare_dtype(config_json(SMALL), "float32")
    (args.folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    train_tokenizer(args.folder, texts(), SMALL.text.vocab)
    tensors = weights(args.seed)
    specs = [Spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_shards(args.folder, specs, iter(tensors.values()))
    return 0


def texts() -> Iterator[str]:
    """What the captioner reads and writes: captions of every level, prompts, the chat around them."""
    for level in range(len(LEVELS)):
        for index in range(CLIPS):
            for split in SPLITS:
                yield write_caption(make_script(0, index, split, level))
    for text in (f"system\n{SYSTEM}", "user\n", "assistant\n", "\n", *clip.PROMPTS, *PROMPTS):
        yield from [text] * QUESTIONS


def weights(seed: int) -> dict[str, np.ndarray]:
    """Tensors by their names in Hugging Face format."""
    params = jax.tree_util.tree_map_with_path(_scaled, init(SMALL, jax.random.key(seed)))
    tensors = {}
    for name, entry in table(SMALL).items():
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        ours = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
        tensors[name] = np.ascontiguousarray(entry.change.theirs(ours, entry.shape))
    return tensors | {UNUSED: np.zeros((2, SMALL.audio.out), np.float32)}


def _scaled(path: tuple, leaf: jax.Array) -> jax.Array:
    """What `init` draws, at the scale from which training starts well."""
    keys = [key.key for key in path]
    if keys == ["embedding"]:
        return leaf * EMBEDDING
    ends_branch = "layers" in keys and keys[-2] in ("out", "down") and keys[-1] == "kernel"
    return leaf * BRANCH if ends_branch else leaf


if __name__ == "__main__":
    sys.exit(main())
