"""The training state, and the selection of trained parameters."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import init
from avocado_jax.parallel.rules import path_of, shardings
from avocado_jax.typing import Array, Bool, Float, Int

TRAINED = {  # parameter paths by the value of `train`
    "captioner": r"text/.*|embedding|head|vision/merger/.*|audio/proj/.*",  # paper, 4.1: the encoders are frozen
    "all": r".*",
    "adapters": r"vision/merger/.*|audio/proj/.*",
    "lora": r".*/lora_[ab]|vision/merger/.*|audio/proj/.*",
}


class State(NamedTuple):
    """The training state. `optimizer` has moments for trained parameters only."""

    step: Int[Array, ""]  # finished steps, including skipped updates
    params: Any  # stacked layers, trained and frozen
    optimizer: Any
    skipped: Int[Array, ""]  # updates skipped because loss or gradient was not finite
    in_row: Int[Array, ""]  # consecutive skipped updates up to now
    rollouts: Any = ()  # GRPO with several batches per rollout: the newest rollout of each batch, for resuming
    spent: Any = ()  # GRPO with several batches per rollout and spares: bool [spare clips], already used spares


def rest_of(state: State) -> dict[str, Any]:
    """The parts of a state that a checkpoint stores in addition to the parameters, without empty fields."""
    rest = state._replace(params=None)._asdict()  # Orbax stores None
    return {name: value for name, value in rest.items() if name not in ("rollouts", "spent") or jax.tree.leaves(value)}


def split(params: Any, train: str) -> tuple[Any, Any]:
    """Split a parameter tree into (trained, frozen)."""
    pattern, flat = re.compile(TRAINED[train]), flatten_dict(params, sep="/")
    trained = {path: leaf for path, leaf in flat.items() if pattern.fullmatch(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def join(trained: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")


def initial_state(params: Any, optimizer: optax.GradientTransformation, train: str) -> State:
    """The state before the first step."""
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    return State(next(zeros), params, optimizer.init(split(params, train)[0]), *zeros)


def apply_gradient(
    state: State,
    gradient: Any,
    finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    train: str,
    counts: Bool[Array, ""] | bool = True,
) -> tuple[State, Float[Array, ""]]:
    """Apply one update; if not `finite`, change only the counters of skipped updates.

    Args:
        counts: whether the batch has a row with weight. If not, nothing changes: momentum and weight decay would still
            update the parameters.

    Returns:
        The next state and the norm of the update.
    """
    trained, frozen = split(state.params, train)
    updates, moments = optimizer.update(gradient, state.optimizer, trained)

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(finite & counts, new, old), new, old)

    after = state._replace(
        params=join(kept(optax.apply_updates(trained, updates), trained), frozen),
        optimizer=kept(moments, state.optimizer),
        skipped=state.skipped + ~finite,
        in_row=jnp.where(finite, 0, state.in_row + 1),
    )
    return after, optax.tree.norm(updates)


def state_shapes(
    model: ThinkerConfig, train: str, frozen_dtype: str, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
    """The state as ShapeDtypeStructs with shardings, for compiling, loading and restoring.

    Moments are sharded like their parameters; scalars are replicated.

    Raises:
        InputError: `train` is unknown.
    """
    if train not in TRAINED:
        raise InputError(f"train: {train!r} is not one of {', '.join(TRAINED)}")
    pattern = re.compile(TRAINED[train])
    params = jax.eval_shape(partial(init, model), jax.random.key(0))

    def with_sharding(keys: tuple, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if pattern.fullmatch(path_of(keys)) else jnp.dtype(frozen_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(with_sharding, params, shardings(params, mesh))
    state = jax.eval_shape(partial(initial_state, optimizer=optimizer, train=train), params)
    replicated = NamedSharding(mesh, PartitionSpec())

    known = {path: leaf.sharding for path, leaf in flatten_dict(params, sep="/").items()}

    def shard_moment(keys: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        # A moment's path in the optimizer ends with the path of its parameter.
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=known.get(path, replicated))

    rest = jax.tree_util.tree_map_with_path(shard_moment, state._replace(params=None))
    return rest._replace(params=params)
