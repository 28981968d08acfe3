"""Group-relative policy optimisation: scores and updates from rollouts and rewards (paper, 4.2; Shao et al. 2024).

A row is one clip and its G captions, with the loss and gradient of G rows of one caption each. Frozen encoders run once
per step; sampler, policy and reference share their output and apply their own adapters to it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.models.thinker import Encoded, Thinker, output_matrix
from avocado_jax.parallel import rules
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import with_tensor
from avocado_jax.parallel.parts import by_parts, in_parts
from avocado_jax.sampling.weights import decoding_weights
from avocado_jax.train.losses import Scores, caption_scores
from avocado_jax.train.objective import SHARES, ObjectiveTotals, check_objective, objective, without_overlong
from avocado_jax.train.optim import gradient, optimizer, schedule
from avocado_jax.train.rollout import VIEW_AXES, Rollout, roll_out
from avocado_jax.train.state import State, apply_gradient, initial_state, join, split, state_shapes
from avocado_jax.typing import Array, Captions, Clip, Float

Metrics = dict[str, Array]


class Scored(NamedTuple):
    """Log-probabilities of the sampled tokens before the first update, computed by the trainer's forward pass."""

    old: Float[Array, "B G C"] | None  # of the policy; None with one update per rollout, which computes them itself
    reference: Float[Array, "B G C"] | None  # None if beta is 0


class Experience(NamedTuple):
    """The input of an update."""

    clip: Clip
    encoded: Encoded | None  # None if the encoders are trained
    rollout: Rollout
    scored: Scored
    advantage: Float[Array, "B G"]
    weight: Float[Array, "B"]  # 0 masks a row


class _UpdateTotals(NamedTuple):
    """Sums over the valid tokens."""

    objective: ObjectiveTotals
    entropy: Float[Array, ""]
    gap: Float[Array, ""]  # |log p_trainer - log p_sampler| of the sampling policy


def caption_logprobs(
    model: ThinkerConfig,
    params: Any,
    clip: Clip,
    encoded: Encoded | None,
    captions: Captions,
    temperature: float,
) -> Scores:
    """Scores of captions under a policy at this temperature."""
    hidden = Thinker(model).apply({"params": params}, clip, captions, encoded)
    return caption_scores(hidden, output_matrix(model, params), captions.targets, temperature)


def reference_part(params: Any, train: str, dtype: str) -> Any:
    """The parameters that the reference does not share with the policy: trained ones, without low-rank adapters."""
    flat = flatten_dict(split(params, train)[0])
    kept = {path: leaf.astype(dtype) for path, leaf in flat.items() if path[-1] not in ("lora_a", "lora_b")}
    return unflatten_dict(kept)


def score(
    params: Any,
    reference: Any,
    clip: Clip,
    encoded: Encoded | None,
    captions: Captions,
    *,
    model: ThinkerConfig,
    config: GrpoConfig,
) -> Scored:
    """Log-probabilities of the captions under the reference, and under the policy if a rollout has several updates."""

    def of(model: ThinkerConfig, params: Any) -> Array:
        def run(*rows: Any) -> Array:
            return caption_logprobs(model, params, *rows, config.sampling.temperature).logprob

        return by_parts(run, (clip, encoded, captions), config.accumulate)

    base = replace(model, text=replace(model.text, lora=None))
    frozen = split(params, config.train)[1]
    return Scored(
        of(model, params) if config.passes * config.minibatches > 1 else None,
        of(base, join(reference, frozen)) if config.objective.beta else None,
    )


def batch_gradient(
    params: Any, experience: Experience, *, model: ThinkerConfig, config: GrpoConfig
) -> tuple[Any, Array, _UpdateTotals]:
    """The gradient with respect to the trained parameters, the loss, and its components."""
    trained, frozen = split(params, config.train)
    _, _, rollout, _, _, weight = experience
    counted = jnp.broadcast_to(weight[:, None], rollout.truncated.shape)
    valid = rollout.captions.valid & (weight > 0)[:, None, None]
    if config.objective.mask_overlong:
        valid = without_overlong(valid, rollout.truncated)
    shares = SHARES[config.objective.aggregate](valid, counted, config.sampling.tokens)

    def loss(trained: Any, rows: Experience, valid: Array, shares: Array) -> tuple[Array, tuple[Array, _UpdateTotals]]:
        captions, sampled = rows.rollout.captions, rows.rollout.sampled
        temperature = config.sampling.temperature
        new = caption_logprobs(model, join(trained, frozen), rows.clip, rows.encoded, captions, temperature)
        here = jax.lax.stop_gradient(new.logprob)
        old, reference = (here if one is None else one for one in rows.scored)
        total, totals = objective(new.logprob, old, sampled, reference, rows.advantage, valid, shares, config.objective)
        entropy = jnp.sum(new.entropy, where=valid)
        gap = jnp.sum(jnp.abs(old - sampled), where=valid)
        return total, (jax.lax.stop_gradient(total), _UpdateTotals(totals, entropy, gap))

    grads, (total, totals) = gradient(loss, trained, (experience, valid, shares), config.accumulate)
    return grads, total, totals


def grpo_update(
    state: State,
    experience: Experience,
    *,
    model: ThinkerConfig,
    config: GrpoConfig,
    adamw: optax.GradientTransformation,
    rate: optax.Schedule,
) -> tuple[State, Metrics]:
    """All updates of one rollout: `passes` over its rows, in `minibatches`.

    If the loss or the gradient of an update is not finite, only the counters change.

    Returns:
        The next state, and metrics as fp32 scalars: `loss` and its part `policy_loss`; `kl` to the reference, `moved`
        (KL to the sampling policy; both k3, nats per token), `entropy`, `ratio`, fractions of tokens `clipped_low` and
        `clipped_high`, and `sampler_gap`, all means over tokens and updates; mean `length` and fraction `truncated` of
        captions; the rest as in `sft_step`.
    """

    def once(state: State, part: Experience) -> tuple[State, tuple]:
        grads, loss, totals = batch_gradient(state.params, part, model=model, config=config)
        norm = optax.tree.norm(grads)
        finite, counts = jnp.isfinite(norm) & jnp.isfinite(loss), jnp.any(part.weight > 0)
        state, moved = apply_gradient(state, grads, finite, adamw, config.train, counts)
        return state, (loss, norm, moved, totals)

    if (updates := config.passes * config.minibatches) == 1:
        after, results = once(state, experience)
    else:
        minibatches = in_parts(experience, config.minibatches)
        after, results = jax.lax.scan(
            lambda state, _: jax.lax.scan(once, state, minibatches), state, length=config.passes
        )
    loss, norm, moved, (totals, entropy, gap) = jax.tree.map(lambda leaf: jnp.sum(leaf) / updates, results)
    tokens = jnp.maximum(totals.tokens, 1e-9)
    rollout, weight = experience.rollout, experience.weight
    captions = jnp.maximum(jnp.sum(weight) * rollout.lengths.shape[1], 1)
    metrics = {
        "loss": loss,
        "policy_loss": totals.policy,
        "kl": totals.kl / tokens,
        "moved": totals.moved / tokens,
        "entropy": entropy / tokens,
        "ratio": totals.ratio / tokens,
        "clipped_low": totals.clipped_low / tokens,
        "clipped_high": totals.clipped_high / tokens,
        "sampler_gap": gap / tokens,
        "length": jnp.sum(rollout.lengths * weight[:, None]) / captions,
        "truncated": jnp.sum(rollout.truncated * weight[:, None]) / captions,
        "gradient_norm": norm,
        "update_norm": moved,
        "lr": rate(state.step * updates - state.skipped),
        "tokens": jnp.sum(rollout.lengths * weight[:, None]),
        "clip_tokens": jnp.sum(experience.clip.length * weight) / config.split,
        "rows": jnp.sum(weight) / config.split,
        "skipped": after.skipped,
        "skipped_in_row": after.in_row,
    }
    return after._replace(step=state.step + 1), metrics


class GrpoProgram(NamedTuple):
    """The jitted phases of a step.

    Attributes:
        sampler: model of the view: separate layers, with int8 kernels if `rollout_int8` is set.
        sampler_mesh: mesh of the view: the devices of the training mesh, with `mesh.rollout_tensor`.
        state: shapes with shardings.
        reference: the same for `reference_part`.
        begin: parameters -> state; donates the parameters.
        encode: (parameters, clip) -> encoded; None if the encoders are trained.
        view: parameters -> the sampler's parameters.
        roll_out: (view, clips, encoded, step, banned) -> rollouts, each of a batch; spare batches come last.
        score: (parameters, reference, clip, encoded, captions) -> scored.
        update: (state, experience) -> (state, metrics); donates the state.
    """

    sampler: ThinkerConfig
    sampler_mesh: Mesh
    state: State
    reference: Any
    begin: Callable
    encode: Callable | None
    view: Callable
    roll_out: Callable
    score: Callable
    update: Callable


def check_grpo(config: GrpoConfig) -> None:
    """Validate the fields of the objective and of the rollout against each other.

    Raises:
        InputError: a field is invalid.
    """
    check_objective(config.objective)
    if config.rollout_batches < 1 or config.steps % config.rollout_batches:
        raise InputError(f"rollout_batches: {config.rollout_batches} does not divide {config.steps} steps")
    if config.rollout_int8 and not config.objective.importance_cap:
        raise InputError(
            "rollout_int8: the sampler's rounded weights are another policy, which needs objective.importance_cap "
            "(try 2.0)"
        )
    if config.rollout_batches > 1 and not config.objective.importance_cap:
        raise InputError(
            "rollout_batches: updates after the first learn from captions of an earlier policy, which needs "
            "objective.importance_cap (try 2.0)"
        )


def sampler_mesh(config: GrpoConfig, mesh: Mesh) -> Mesh:
    """The training mesh with `mesh.rollout_tensor` as its `tensor` axis."""
    return with_tensor(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])


def grpo_program(
    config: GrpoConfig, model: ThinkerConfig, mesh: Mesh, steps: int, stops: tuple[int, ...]
) -> GrpoProgram:
    """The phases of `config` on a mesh.

    Raises:
        InputError: the objective, `rollout_batches` or `mesh.rollout_tensor` is invalid, or the mesh does not divide
            the batch.
    """
    check_grpo(config)
    over = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate * config.minibatches
    if config.group % config.split or config.batch * config.split % over:
        raise InputError(
            f"batch: {config.batch} clips of {config.group} captions, each in {config.split} rows, are not divided by "
            f"data x fsdp x accumulate x minibatches = {over}"
        )
    on_mesh, sampler = sampler_mesh(config, mesh), computed(model, model.dtype, scan=False)
    sampler = replace(sampler, text=replace(sampler.text, int8=config.rollout_int8))
    updates = steps * config.passes * config.minibatches
    make = optimizer(config.optim, updates)
    shapes = state_shapes(model, config.train, config.frozen_dtype, make, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    rows, replicated = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    frozen_encoders = config.train != "all"

    def encode(params: Any, clip: Clip) -> Encoded:
        run = partial(Thinker(model).apply, {"params": params}, method="encode")
        return by_parts(run, (clip,), config.accumulate)

    bound = dict(model=model, config=config)
    sample = partial(
        roll_out,
        model=sampler,
        sampling=config.sampling,
        group=config.group,
        split=config.split,
        stops=stops,
        seed=config.seed,
        mesh=on_mesh,
        parts=config.accumulate,
        together=config.rollout_batches,
    )
    view = partial(
        decoding_weights,
        dtype=model.dtype,
        mesh=on_mesh,
        axes=VIEW_AXES,
        encoders=not frozen_encoders,
        int8=config.rollout_int8,
    )
    update = partial(grpo_update, **bound, adamw=make, rate=schedule(config.optim, updates))
    reference = partial(reference_part, train=config.train, dtype=config.reference_dtype)
    view_shardings = rules.shardings(jax.eval_shape(view, shapes.params), on_mesh, over=VIEW_AXES)
    return GrpoProgram(
        sampler=sampler,
        sampler_mesh=on_mesh,
        state=shapes,
        reference=_placed(jax.eval_shape(reference, shapes.params), shapes.params),
        begin=jax.jit(
            partial(initial_state, optimizer=make, train=config.train), donate_argnums=0, out_shardings=shardings
        ),
        encode=jax.jit(encode, out_shardings=rows) if frozen_encoders else None,
        view=jax.jit(view, out_shardings=view_shardings),
        roll_out=jax.jit(sample, out_shardings=rows),
        score=jax.jit(partial(score, **bound), out_shardings=rows),
        update=jax.jit(update, donate_argnums=0, out_shardings=(shardings, replicated)),
    )


def _placed(shapes: Any, like: Any) -> Any:
    """Shapes with the shardings of the leaves of `like` at the same paths."""
    known = flatten_dict(like)
    return unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=known[path].sharding)
            for path, leaf in flatten_dict(shapes).items()
        }
    )
