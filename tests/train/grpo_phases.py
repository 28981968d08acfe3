"""The phases of a tiny GRPO config, ragged clips and parameters with O(1) logits."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.bench.model import random_clip
from avocado_jax.config import GrpoConfig, OptimConfig, SamplingConfig
from avocado_jax.models.config import TINY
from avocado_jax.models.thinker import Thinker, init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.grpo import Experience, grpo_program
from avocado_jax.train.objective import advantages
from avocado_jax.train.sft import model_of

B, G, C = 8, 4, 12
STOPS = (258,)
CONFIG = GrpoConfig(
    batch=B,
    group=G,
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    sampling=SamplingConfig(tokens=C),
    optim=OptimConfig(lr=1e-3, warmup=0.0),
)
COOL = SamplingConfig(tokens=C, temperature=0.7)
MODEL = model_of(CONFIG, TINY)


def clips(rows):
    """Ragged clips with picture and sound."""
    rng = np.random.default_rng(0)
    clip = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), rows, 0), random_clip(TINY, 100, (4, 4)))
    clip.media[:, 20:60] = 16 + np.arange(40)  # sound behind the 16 tokens of the picture
    return clip._replace(
        tokens=rng.integers(0, 256, clip.tokens.shape).astype(np.int32),
        length=rng.integers(60, 100, rows).astype(np.int32),
        patches=rng.integers(0, 256, clip.patches.shape).astype(np.uint8),
        mel=rng.normal(size=clip.mel.shape).astype(np.float32),
    )


def random_params(model, key=0):
    """Parameters with O(1) logits, so that captions differ."""
    params = jax.jit(partial(init, model))(jax.random.key(key))
    return params | {"embedding": params["embedding"] * 50, "head": params["head"] * 20}


def encoded_clip(params, clip):
    return jax.jit(partial(Thinker(MODEL).apply, method="encode"))({"params": params}, clip)


@cache
def program_of(config, model, mesh):
    return grpo_program(config, model, mesh, 10, STOPS)


class Run:
    """The phases of a config on a mesh, from one set of parameters."""

    def __init__(self, config, sizes=(1, 1, 1), base=TINY):
        self.config, self.model = config, model_of(config, base)
        self.mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(self.mesh):
            self.program = program = program_of(config, self.model, self.mesh)
            spread = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
            params = jax.device_put(random_params(self.model), spread)
            shapes = flatten_dict(program.reference)
            flat = flatten_dict(params)
            self.reference = unflatten_dict({path: jnp.copy(flat[path]) for path in shapes})
            self.state = program.begin(params)
            self.clip = jax.device_put(clips(config.batch), rows_sharding(self.mesh))
        self.banned = jnp.arange(TINY.text.vocab) >= 259

    def rollout(self, step=0, state=None):
        state = state or self.state
        with jax.set_mesh(self.mesh):
            encoded = self.program.encode and self.program.encode(state.params, self.clip)
            view = self.program.view(state.params)
            (rollout,) = self.program.roll_out(view, (self.clip,), (encoded,), jnp.int32(step), self.banned)
            return encoded, rollout

    def score(self, encoded, rollout, state=None):
        state = state or self.state
        with jax.set_mesh(self.mesh):
            return self.program.score(state.params, self.reference, self.clip, encoded, rollout.captions)

    def update(self, encoded, rollout, scored, rewards):
        weight = np.ones(self.config.batch, np.float32)
        with jax.set_mesh(self.mesh):
            rows = jax.device_put(
                (np.asarray(advantages(rewards, self.config.objective)), weight), rows_sharding(self.mesh)
            )
            batch = Experience(self.clip, encoded, rollout, scored, *rows)
            self.state, metrics = self.program.update(self.state, batch)
        return {name: float(value) for name, value in metrics.items()}
