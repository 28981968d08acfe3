"""Supervised fine-tuning: mean cross-entropy over caption tokens, one update per step (paper, 4.1)."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import RunConfig, SftConfig
from avocado_jax.models.config import Lora, SplashBlocks, ThinkerConfig, computed
from avocado_jax.models.thinker import Thinker, output_matrix
from avocado_jax.train.losses import LossTotals, counted, loss_totals
from avocado_jax.train.optim import gradient, optimizer, schedule
from avocado_jax.train.state import State, apply_gradient, initial_state, join, split, state_shapes
from avocado_jax.typing import Array, Captions, Clip, Float

Metrics = dict[str, Array]


def batch_totals(
    model: ThinkerConfig, params: Any, clip: Clip, captions: Captions, weight: Float[Array, "B"]
) -> LossTotals:
    """Cross-entropy sums of a batch."""
    hidden = Thinker(model).apply({"params": params}, clip, captions)
    return loss_totals(hidden, output_matrix(model, params), captions, weight)


def sft_step(
    state: State,
    clip: Clip,
    captions: Captions,
    weight: Float[Array, "B"],
    *,
    model: ThinkerConfig,
    adamw: optax.GradientTransformation,
    rate: optax.Schedule,
    train: str,
    accumulate: int,
) -> tuple[State, Metrics]:
    """One update. If the loss or the gradient is not finite, only the counters change.

    Returns:
        The next state, and metrics as fp32 scalars: `loss` (nats per token), `accuracy` of the most likely token, norms
        of gradient and update, `lr`, numbers of counted `tokens`, `clip_tokens` and `rows`, and skipped updates (in
        total and consecutive).
    """
    trained, frozen = split(state.params, train)
    total = jnp.maximum(jnp.sum(counted(captions, weight)), 1)

    def loss(trained: Any, *rows: Any) -> tuple[Array, LossTotals]:
        totals = batch_totals(model, join(trained, frozen), *rows)
        return totals.loss / total, totals

    grads, totals = gradient(loss, trained, (clip, captions, weight), accumulate)
    norm = optax.tree.norm(grads)
    after, moved = apply_gradient(state, grads, jnp.isfinite(norm) & jnp.isfinite(totals.loss), adamw, train)
    after = after._replace(step=state.step + 1)
    count = jnp.maximum(totals.count, 1)
    metrics = {
        "loss": totals.loss / count,
        "accuracy": totals.correct / count,
        "gradient_norm": norm,
        "update_norm": moved,
        "lr": rate(state.step - state.skipped),
        "tokens": totals.count,
        "clip_tokens": jnp.sum(clip.length * weight),
        "rows": jnp.sum(weight),
        "skipped": after.skipped,
        "skipped_in_row": after.in_row,
    }
    return after, metrics


def model_of(config: RunConfig, checkpoint: ThinkerConfig) -> ThinkerConfig:
    """A checkpoint's model with the dtype, remat, attention and adapters of the config.

    Parameters are fp32: in bf16 most updates would be rounded away.
    """
    model = computed(checkpoint, config.dtype, scan=True, remat=config.remat)
    lora = Lora(config.lora.rank, config.lora.alpha) if config.train == "lora" else None
    text = replace(model.text, lora=lora)
    splash = SplashBlocks(**asdict(config.splash))
    return replace(model, text=text, param_dtype="float32", attention=config.attention, splash=splash)


def sft_program(config: SftConfig, model: ThinkerConfig, mesh: Mesh, steps: int) -> tuple[State, Callable, Callable]:
    """The state's shapes with shardings, the jitted step, and the jitted `initial_state`.

    The step is `(state, clip, captions, weight, cut) -> (state, metrics)`; it donates the state.
    """
    make = optimizer(config.optim, steps)
    shapes = state_shapes(model, config.train, config.frozen_dtype, make, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    replicated = NamedSharding(mesh, PartitionSpec())
    bound = partial(
        sft_step,
        model=model,
        adamw=make,
        rate=schedule(config.optim, steps),
        train=config.train,
        accumulate=config.accumulate,
    )

    def step(state: State, clip: Any, captions: Any, weight: Any, truncated: Any) -> tuple[State, dict[str, Any]]:
        state, metrics = bound(state, clip, captions, weight)
        return state, metrics | {"cut": jnp.sum(truncated)}

    start = jax.jit(
        partial(initial_state, optimizer=make, train=config.train), donate_argnums=0, out_shardings=shardings
    )
    return shapes, jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)), start
