"""StableHLO lines and matmuls of `roll_out` at full size, which determine its compile time; nothing is compiled.

python tests/measure_rollout_size.py [--size 3b] [--train captioner]
"""

import argparse
import sys

import jax

from avocado_jax.config import GrpoConfig, SamplingConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.models.config import SIZES
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.grpo import grpo_program
from avocado_jax.train.programs import sampling_programs, step_shapes
from avocado_jax.train.sft import model_of

TOKENS = 640
BUCKET = Bucket(Shape(8192, 15, 40, 8), TOKENS)


def main() -> int:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--train", choices=("captioner", "lora"), default="captioner")
    given = parser.parse_args()
    config = GrpoConfig(batch=1, group=8, train=given.train, sampling=SamplingConfig(tokens=TOKENS))
    model, mesh = model_of(config, SIZES[given.size]), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = grpo_program(config, model, mesh, 10, (0,))
        shapes = step_shapes(config, model, program, BUCKET, mesh)
        rollout = sampling_programs(config, model, program, shapes)["rollout"]
        text = rollout.run.lower(*rollout.args).as_text()
    print(
        f"{given.size}, {given.train}: {len(text.splitlines())} lines, {text.count('stablehlo.dot_general')} products"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
