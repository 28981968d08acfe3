"""The vision encoder: dense attention in a window or a temporal patch, without attention across time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.models.attention import backend
from avocado_jax.models.config import Kernel, ThinkerConfig
from avocado_jax.models.layers import GatedMLP, RMSNorm, dense, gelu, layer_input, stack_of
from avocado_jax.models.rope import Rope, patch_rope, rotate
from avocado_jax.typing import Array, Bool, Float, Int, Shaped


class VisionLayer(nn.Module):
    """Pre-norm layer with attention over windows of slots or, if `full`, over all slots of a temporal patch."""

    width: int
    heads: int
    ffn: int
    kernel: Kernel
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N W U D"],
        full: Bool[Array, ""] | bool,
        rope: Rope,
        valid: Bool[Array, "N W U"],
    ) -> tuple[Float[Array, "N W U D"], None]:
        norms = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = layer_input(x)
        y = RMSNorm(name="attention_norm", **norms)(x)
        q, k, v = (dense(self, self.width, name)(y).reshape(*y.shape[:3], self.heads, -1) for name in ("q", "k", "v"))
        q, k = (rotate(part.astype(jnp.float32), rope).astype(self.dtype) for part in (q, k))

        def over_windows(q: Array, k: Array, v: Array) -> Array:
            n, w, u, *rest = q.shape
            blocks = (part.reshape(n * w, u, *rest) for part in (q, k, v))
            kernel = backend(self.kernel, self.dtype, u)
            return kernel.attend_block(*blocks, valid.reshape(n * w, u)).reshape(q.shape)

        def over_frames(q: Array, k: Array, v: Array) -> Array:
            n, w, u, *rest = q.shape
            blocks = (part.reshape(n, w * u, *rest) for part in (q, k, v))
            kernel = backend(self.kernel, self.dtype, w * u)
            return kernel.attend_block(*blocks, valid.reshape(n, w * u)).reshape(q.shape)

        if isinstance(full, jax.Array):  # traced under a scan
            mixed = jax.lax.cond(full, over_frames, over_windows, q, k, v)
        else:
            mixed = (over_frames if full else over_windows)(q, k, v)
        x = x + dense(self, self.width, "out")(mixed.reshape(x.shape))
        y = RMSNorm(name="mlp_norm", **norms)(x)
        return x + GatedMLP(self.ffn, True, self.dtype, self.param_dtype, name="mlp")(y), None


class VisionTower(nn.Module):
    """Encodes temporal patches (two frames each) in window order to tokens, one per four slots."""

    config: ThinkerConfig

    def setup(self) -> None:
        vision = self.config.vision
        self.merger = Merger(vision.merge**2, vision.out, **self.config.dtypes)

    def __call__(
        self,
        patches: Shaped[Array, "N W U X"],
        grid: Int[Array, "N W U 2"],
        valid: Bool[Array, "N W U"],
    ) -> Float[Array, "N Z D"]:
        """Encode N temporal patches of uint8 pixels. `grid` has the row and column of each slot, `valid` masks padding.

        Returns W * U / 4 tokens per temporal patch, in slot order; tokens of padding slots are undefined.
        """
        return self.adapt(self.encode(patches, grid, valid))

    def adapt(self, features: Float[Array, "N S Y"]) -> Float[Array, "N Z D"]:
        """Apply the adapter, which is trained even if the encoder is frozen."""
        return self.merger(features)

    @nn.compact
    def encode(
        self,
        patches: Shaped[Array, "N W U X"],
        grid: Int[Array, "N W U 2"],
        valid: Bool[Array, "N W U"],
    ) -> Float[Array, "N S Y"]:
        """Features of all slots, before the adapter."""
        vision, dtypes = self.config.vision, self.config.dtypes
        # Pixels are transferred as bytes and normalised on the device: a quarter of the traffic.
        mean, std = (
            np.repeat(np.float32(part) * 255, vision.patch_size // vision.channels)[None, None, None]
            for part in (vision.pixel_mean, vision.pixel_std)
        )
        pixels = (patches.astype(jnp.float32) - mean) / std
        # The reference's Conv3d has stride = kernel, so it is a matrix product over flattened patches.
        x = nn.Dense(vision.width, use_bias=False, name="patch", **dtypes)(pixels.astype(self.config.dtype))
        rope = patch_rope(grid, vision.width // vision.heads, vision.rope_theta)

        sizes = dict(width=vision.width, heads=vision.heads, ffn=vision.ffn, kernel=self.config.kernel, **dtypes)
        full = np.isin(np.arange(vision.layers), vision.full_layers)
        run = stack_of(self, VisionLayer, sizes, vision.layers, self.config)
        x, _ = run(x, full, rope, valid)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Merger(nn.Module):
    """The adapter: `cells` consecutive slots become one token of the language model's width."""

    cells: int
    out: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N Z O"]:
        x = RMSNorm(self.dtype, self.param_dtype, name="norm")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1] * self.cells)
        return dense(self, self.out, "out")(gelu(dense(self, x.shape[-1], "up")(x)))
