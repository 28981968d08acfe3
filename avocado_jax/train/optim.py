"""The optimizer (global-norm clipping, AdamW, linear warm-up, cosine decay) and gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avocado_jax.config import OptimConfig
from avocado_jax.parallel.parts import in_parts
from avocado_jax.typing import Array

MATRICES = ("kernel", "embedding", "head", "lora_a", "lora_b")  # leaves with weight decay; biases and norms have none


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of previous updates: linear to the peak, then a cosine to `final` x peak.

    With W = `warmup` x steps (at least 1), update n = 1 ... W has lr x n / W, so update W has the peak rate.
    """
    warmup = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        config.lr / warmup, config.lr, warmup - 1, max(steps, warmup), config.lr * config.final
    )


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW for the trained parameters. Moments have the dtype of their parameter."""

    def decays(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].key in MATRICES, params)

    rate = schedule(config, steps)
    adamw = optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def gradient(loss: Callable[..., tuple[Array, Any]], trained: Any, batch: tuple, accumulate: int) -> tuple[Any, Any]:
    """The gradient of `loss(trained, *batch) -> (loss, totals)` with respect to `trained`, and the totals.

    Args:
        accumulate: number of microbatches. Their gradients and totals are added, so the result does not depend on it if
            `loss` is a sum over rows.
    """
    microbatch_gradient = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return microbatch_gradient(trained, *batch)
    parts = in_parts(batch, accumulate)

    def add(total: Any, part: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, microbatch_gradient(trained, *part)), None

    _, totals = jax.eval_shape(loss, trained, *jax.tree.map(lambda leaf: leaf[0], parts))
    zero = jax.tree.map(jnp.zeros_like, trained), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), totals)
    return jax.lax.scan(add, zero, parts)[0]
