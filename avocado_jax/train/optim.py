"""The optimizer: clipping by the global norm, AdamW, linear warm-up and cosine decay."""

import jax
import optax

from avocado_jax.config import OptimConfig

MATRICES = ("kernel", "embedding", "head", "lora_a", "lora_b")  # leaves that decay; biases and norms do not


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates: up from 0 over the first `warmup` share, then a cosine to `final`."""
    up = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, up, max(steps, up + 1), config.lr * config.final)


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW over the trained parameters, with fp32 moments where those are fp32."""

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].key in MATRICES, params)

    rate = schedule(config, steps)
    adamw = optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
