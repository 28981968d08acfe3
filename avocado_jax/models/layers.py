"""Building blocks of the encoders and the decoder, and the two layouts of a stack of layers."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from avocado_jax.models.config import TextConfig, ThinkerConfig
from avocado_jax.models.lora import TextDense
from avocado_jax.parallel.mesh import constrain
from avocado_jax.typing import Array, Float

LAYER_INPUT = "layer_input"


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight."""

    dtype: str
    param_dtype: str
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.param_dtype))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return jax.lax.broadcast_to_rank(scale.astype(self.dtype), y.ndim) * y.astype(self.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    ffn: int
    bias: bool
    dtype: str
    param_dtype: str
    text: TextConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate, up = (dense(self, self.ffn, name, self.bias, self.text)(x) for name in ("gate", "up"))
        return dense(self, x.shape[-1], "down", self.bias, self.text)(nn.silu(gate) * up)


def dense(module: Any, features: int, name: str, bias: bool = True, text: TextConfig | None = None) -> nn.Module:
    """A linear layer in the dtypes of its parent module, with the adapter and the int8 kernel that `text` selects."""
    settings = dict(use_bias=bias, dtype=module.dtype, param_dtype=module.param_dtype, name=name)
    if text and (text.lora or text.int8):
        return TextDense(features, **settings, lora=text.lora, int8=text.int8)
    return nn.Dense(features, **settings)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, as in the training of the checkpoints."""
    return nn.gelu(x, approximate=False)


def layer_input(x: Array) -> Array:
    """Shard the input of a layer by rows, and name it for `remat = "offload"`, which moves it to host memory."""
    return checkpoint_name(constrain(x, "rows"), LAYER_INPUT)


def _remat_policy(remat: str) -> Callable | None:
    """The checkpoint policy of an entry of `config.REMAT`."""
    policies = jax.checkpoint_policies
    if remat == "dots":
        return policies.checkpoint_dots_with_no_batch_dims
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


def stack_of(
    module: nn.Module, layer: type[nn.Module], sizes: Mapping[str, Any], count: int, config: ThinkerConfig
) -> Callable:
    """Build a stack of `count` layers: `run(x, per_layer, *shared) -> (x, outputs of each layer)`.

    `layer(**sizes)` is called as `(x, inputs, *shared) -> (x, output)`.

    With `config.scan` the parameters are stacked under `layers` and scanned. Leaves of `per_layer` and of the outputs
    have a leading axis of `count`.

    Without `config.scan`, layer i has the parameters `layers_{i}` and the outputs are a tuple. If `per_layer` is a list
    of `count` entries, as in decoding, the layers are unrolled, so that a step reads each weight in place. Otherwise
    one compiled layer selects its parameters by index. This copies each weight once, which is cheap for long sequences,
    and the program size does not depend on the number of layers.

    Args:
        module: the parent module of the layers.
    """
    if config.remat != "none":
        layer = nn.remat(layer, prevent_cse=not config.scan, policy=_remat_policy(config.remat))

    def scanned(x: Array, per_layer: Any, *shared: Any) -> tuple[Array, Any]:
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast for _ in shared)),
            length=count,
        )
        return stack(**sizes, name="layers")(x, per_layer, *shared)

    def unrolled(x: Array, per_layer: Any, *shared: Any) -> tuple[Array, tuple]:
        outputs = []
        for i in range(count):
            x, output = layer(**sizes, name=f"layers_{i}")(x, per_layer[i], *shared)
            outputs.append(output)
        return x, tuple(outputs)

    def selected(x: Array, per_layer: Any, *shared: Any) -> tuple[Array, tuple]:
        params = module.variables["params"]
        branches = [lambda weights=params[f"layers_{i}"]: weights for i in range(count)]

        def body(x: Array, item: tuple[Array, Any]) -> tuple[Array, Any]:
            number, inputs = item
            weights = jax.lax.switch(number, branches)
            return layer(**sizes, parent=None).apply({"params": weights}, x, inputs, *shared)

        x, outputs = jax.lax.scan(body, x, (jnp.arange(count), per_layer))
        return x, tuple(jax.tree.map(itemgetter(i), outputs) for i in range(count))

    def separate(x: Array, per_layer: Any, *shared: Any) -> tuple[Array, tuple]:
        creating = module.is_initializing()
        if creating and per_layer is None:
            per_layer = [None] * count
        run = unrolled if creating or isinstance(per_layer, list) else selected
        return run(x, per_layer, *shared)

    return scanned if config.scan else separate
