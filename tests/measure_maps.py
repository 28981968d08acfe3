"""Memory maps and memory of one process over many compilations.

  python tests/measure_maps.py [--programs 500] [--kind step|small] [--release N]

`step` compiles the SFT step of the tiny model for captions of ever more tokens, `small` a product and a sum.
`--release N` calls `jax.clear_caches()` after every N programs.
"""

import argparse
import gc
import resource
from functools import partial

import jax
import jax.numpy as jnp

from avocado_jax.config import SftConfig
from avocado_jax.models.config import SIZES
from avocado_jax.models.thinker import example
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.programs import memory_maps
from avocado_jax.train.sft import model_of, sft_program


def _steps(count: int):
    config = SftConfig(batch=1, dtype="float32", frozen_dtype="float32")
    model, mesh = model_of(config, SIZES["tiny"]), make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        shapes, step, _ = sft_program(config, model, mesh, 1000)
        for number in range(count):
            clip, captions = example(model, shape=(64, 1, 1, 1), caption=8 + number)
            row = (jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
            yield step.lower(shapes, clip, captions, *row).compile()


def _small(count: int):
    for number in range(count):
        program = jax.jit(partial(lambda scale, x: jnp.sum(x @ x) * scale, number))
        program(jnp.ones((8 + number % 8,) * 2))
        yield program


def main() -> None:
    """Print a line every tenth of the programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--kind", choices=("step", "small"), default="small")
    parser.add_argument("--release", type=int, default=0)
    args = parser.parse_args()
    kept = []
    for number, program in enumerate((_steps if args.kind == "step" else _small)(args.programs), 1):
        kept.append(program)
        if args.release and number % args.release == 0:
            kept.clear()
            jax.clear_caches()
            gc.collect()
        if number % max(1, args.programs // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{number} programs: {memory_maps()} maps, peak memory {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
