"""Memory maps and memory of one process over many compilations.

  PYTHONPATH=. python tests/measure_maps.py [--programs 500] [--kind gradient|small] [--bound]

`gradient` compiles the gradient of the tiny model for captions of ever more tokens, `small` a product and a sum.
Without --bound nothing drops compiled programs: with 60 of `gradient` the process dies of a segmentation fault.
"""

import argparse
import resource
from functools import partial

import jax
import jax.numpy as jnp

from avocado_jax.models.config import SIZES
from avocado_jax.models.thinker import Thinker, example, init
from avocado_jax.parallel.programs import bound_compiled_programs, memory_maps


def _gradients(count: int):
    model = SIZES["tiny"]
    params = init(model, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda params, *row: jnp.sum(Thinker(model).apply({"params": params}, *row))))
    for number in range(count):
        row = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example(model, caption=8 + number))
        gradient(params, *row)
        yield gradient


def _small(count: int):
    for number in range(count):
        program = jax.jit(partial(lambda scale, x: jnp.sum(x @ x) * scale, number))
        program(jnp.ones((8 + number % 8,) * 2))
        yield program


def main() -> None:
    """Print a line every tenth of the programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--kind", choices=("gradient", "small"), default="small")
    parser.add_argument("--bound", action="store_true", help="drop programs as `avocado` does")
    args = parser.parse_args()
    if args.bound:
        bound_compiled_programs()
    kept = []
    for number, program in enumerate((_gradients if args.kind == "gradient" else _small)(args.programs), 1):
        kept.append(program)
        if number % max(1, args.programs // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{number} programs: {memory_maps()} maps, peak memory {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
