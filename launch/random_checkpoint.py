"""Write a checkpoint of random weights in Hugging Face format, one tensor in memory at a time.

python launch/random_checkpoint.py DIR --size tiny            # for a first look: the words are noise
python launch/random_checkpoint.py DIR --size 7b --dtype bfloat16
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avocado_jax.checkpoint.convert import DTYPES
from avocado_jax.checkpoint.hf import UNUSED, table
from avocado_jax.checkpoint.hf_config import config_json
from avocado_jax.checkpoint.safetensors import Spec, write_shards
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.models.config import SIZES


def main() -> int:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--size", choices=("tiny", "3b", "7b"), default="tiny", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    config, dtype = SIZES[args.size], DTYPES[args.dtype]
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch is absent
    (args.folder / "config.json").write_text(json.dumps(config_json(config), indent=2) + "\n")
    write_tokenizer(args.folder)
    shapes = {name: entry.shape for name, entry in table(config).items()} | {UNUSED: (2, config.audio.out)}
    specs = [Spec(name, dtype, shape) for name, shape in shapes.items()]
    rng = np.random.default_rng(args.seed)
    pool = rng.standard_normal(2**22, np.float32)  # a billion numbers are drawn from it faster than anew

    def values() -> Iterator[np.ndarray]:
        for spec in specs:
            rows = spec.shape[0]
            per_row = int(np.prod(spec.shape[1:]))
            if len(spec.shape) == 1:  # O(1) norms and biases of both signs: nothing in the model is left idle
                yield (rng.standard_normal(rows) * 0.3 + ("norm" in spec.name or "ln_" in spec.name)).astype(dtype)
                continue
            scale = 1.0 if "embed" in spec.name else per_row**-0.5
            run = max(1, len(pool) // per_row)
            for first in range(0, rows, run):
                count = min(run, rows - first)
                start = rng.integers(0, max(1, len(pool) - count * per_row + 1))
                piece = np.resize(pool[start:], count * per_row) * np.float32(scale)
                yield piece.astype(dtype).reshape(count, *spec.shape[1:])

    write_shards(args.folder, specs, values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
