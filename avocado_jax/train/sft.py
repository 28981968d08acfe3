"""Supervised fine-tuning: the mean cross-entropy of caption tokens, one update a step (paper, 4.1)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import SftConfig
from avocado_jax.models.config import Lora, ThinkerConfig, computed
from avocado_jax.models.thinker import Thinker
from avocado_jax.train.losses import Sums, caption_sums, counted
from avocado_jax.train.optim import optimizer, schedule
from avocado_jax.train.state import State, begin, join, split, state_shapes
from avocado_jax.typing import Array, Captions, Clip, Float

Metrics = dict[str, Array]


def batch_sums(model: ThinkerConfig, params: Any, clip: Clip, captions: Captions, weight: Float[Array, "B"]) -> Sums:
    """Cross-entropy sums of a batch under `params`."""
    thinker = Thinker(model)
    hidden = thinker.apply({"params": params}, clip, captions)
    return caption_sums(hidden, partial(thinker.apply, {"params": params}, method="logits"), captions, weight)


def gradients(
    model: ThinkerConfig,
    trained: Any,
    frozen: Any,
    batch: tuple[Clip, Captions, Float[Array, "B"]],
    accumulate: int,
) -> tuple[Any, Sums]:
    """The gradient of the mean loss over all caption tokens of the batch, and the sums.

    With `accumulate`, the batch is taken in that many parts: row r is in part r % accumulate, so that each device
    keeps its own rows. The gradient is that of the whole batch, whatever the number.
    """
    _, captions, weight = batch
    total = jnp.maximum(jnp.sum(counted(captions, weight)), 1)

    def loss(trained: Any, clip: Clip, captions: Captions, weight: Array) -> tuple[Array, Sums]:
        sums = batch_sums(model, join(trained, frozen), clip, captions, weight)
        return sums.loss / total, sums

    gradient = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return gradient(trained, *batch)

    def parts(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 1, 0)

    def add(total: Any, part: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trained, *part)), None

    zero = jax.tree.map(jnp.zeros_like, (trained, Sums(*(jnp.float32(0),) * 3)))
    return jax.lax.scan(add, zero, jax.tree.map(parts, batch))[0]


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
    """One update. A step whose loss or gradient is not finite changes nothing but the counters.

    Returns the next state, and fp32 scalars: `loss` (nats a token), `accuracy` of the most likely token, norms of
    gradient and update, `lr`, `tokens` that counted and `clip_tokens` read, `rows` that counted, and the number of
    steps skipped, in all and last in a row.
    """
    trained, frozen = split(state.params, train)
    grads, sums = gradients(model, trained, frozen, (clip, captions, weight), accumulate)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
    updates, moments = adamw.update(grads, state.optimizer, trained)

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

    after = State(
        step=state.step + 1,
        params=join(kept(optax.apply_updates(trained, updates), trained), frozen),
        optimizer=kept(moments, state.optimizer),
        skipped=state.skipped + ~good,
        in_row=jnp.where(good, 0, state.in_row + 1),
    )
    count = jnp.maximum(sums.count, 1)
    metrics = {
        "loss": sums.loss / count,
        "accuracy": sums.correct / count,
        "gradient_norm": norm,
        "update_norm": optax.tree.norm(updates),
        "lr": rate(state.step - state.skipped),
        "tokens": sums.count,
        "clip_tokens": jnp.sum(clip.length * weight),
        "rows": jnp.sum(weight),
        "skipped": after.skipped,
        "skipped_in_row": after.in_row,
    }
    return after, metrics


def model_of(config: SftConfig, held: ThinkerConfig) -> ThinkerConfig:
    """The model that a checkpoint holds, as the config computes it."""
    model = computed(held, config.dtype, scan=True, remat=config.remat)
    lora = Lora(config.lora.rank, config.lora.alpha) if config.train == "lora" else None
    text = replace(model.text, lora=lora)
    return replace(model, text=text, param_dtype=config.param_dtype, attention=config.attention)


def sft_program(config: SftConfig, model: ThinkerConfig, mesh: Mesh, steps: int) -> tuple[State, Callable, Callable]:
    """The state's shapes with shardings, the jitted step, and the jitted `begin`.

    The step is `(state, clip, captions, weight, cut) -> (state, metrics)`; it takes the state's memory over.
    """
    make = optimizer(config.optim, steps)
    shapes = state_shapes(model, config.train, config.frozen_dtype, make, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    whole = NamedSharding(mesh, PartitionSpec())
    bound = partial(
        sft_step,
        model=model,
        adamw=make,
        rate=schedule(config.optim, steps),
        train=config.train,
        accumulate=config.accumulate,
    )

    def step(state: State, clip: Any, captions: Any, weight: Any, cut: Any) -> tuple[State, dict[str, Any]]:
        state, metrics = bound(state, clip, captions, weight)
        return state, metrics | {"cut": jnp.sum(cut)}

    start = jax.jit(partial(begin, optimizer=make, train=config.train), donate_argnums=0, out_shardings=shardings)
    return shapes, jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole)), start
