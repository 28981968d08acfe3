"""The audio encoder: independent chunks of 200 mel frames, pooled to 50 tokens per chunk."""

import flax.linen as nn
import jax.numpy as jnp

from avocado_jax.models.attention import backend
from avocado_jax.models.config import Kernel, ThinkerConfig
from avocado_jax.models.layers import dense, gelu, layer_input, stack_of
from avocado_jax.models.rope import sinusoids
from avocado_jax.typing import Array, Bool, Float, Int


class AudioLayer(nn.Module):
    """Pre-norm transformer layer; the key projection has no bias."""

    width: int
    heads: int
    ffn: int
    kernel: Kernel
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "N U D"], _: None, valid: Bool[Array, "N U"]
    ) -> tuple[Float[Array, "N U D"], None]:
        x = layer_input(x)
        y = layer_norm(self, "attention_norm")(x)
        q, k, v = (
            dense(self, self.width, name, bias=name != "k")(y).reshape(*y.shape[:2], self.heads, -1)
            for name in ("q", "k", "v")
        )
        mixed = backend(self.kernel, self.dtype, q.shape[1]).attend_block(q, k, v, valid)
        x = x + dense(self, self.width, "out")(mixed.reshape(y.shape))
        y = gelu(dense(self, self.ffn, "up")(layer_norm(self, "mlp_norm")(x)))
        return x + dense(self, self.width, "down")(y), None


class AudioTower(nn.Module):
    """Encodes log-mel chunks to tokens of the language model's width, 25 per second (Qwen2.5-Omni, 2.2)."""

    config: ThinkerConfig

    def setup(self) -> None:
        self.proj = nn.Dense(self.config.audio.out, **self.config.dtypes)

    def __call__(self, mel: Float[Array, "N 200 M"], length: Int[Array, "N"]) -> Float[Array, "N U D"]:
        """Encode N chunks. `length` is the number of valid frames of each; frames past it must be zero.

        Returns 50 tokens per chunk, of which the first ((length - 1) // 2 + 1) // 2 are valid.
        """
        return self.adapt(self.encode(mel, length))

    def adapt(self, features: Float[Array, "N U Y"]) -> Float[Array, "N U D"]:
        """Apply the adapter, which is trained even if the encoder is frozen."""
        return self.proj(features)

    @nn.compact
    def encode(self, mel: Float[Array, "N 200 M"], length: Int[Array, "N"]) -> Float[Array, "N U Y"]:
        """Features of 50 positions per chunk, before the adapter."""
        audio, dtypes = self.config.audio, self.config.dtypes
        dtype = dtypes["dtype"]
        conv = dict(kernel_size=(3,), padding=1, **dtypes)
        x = gelu(nn.Conv(audio.width, name="conv1", **conv)(mel.astype(dtype)))
        x = jnp.where((jnp.arange(mel.shape[1])[None] < length[:, None])[..., None], x, 0)
        x = gelu(nn.Conv(audio.width, strides=2, name="conv2", **conv)(x))
        x = x + sinusoids(audio.window, audio.width).astype(dtype)[None]
        valid = jnp.arange(audio.window)[None] < ((length - 1) // 2 + 1)[:, None]

        sizes = dict(width=audio.width, heads=audio.heads, ffn=audio.ffn, kernel=self.config.kernel, **dtypes)
        run = stack_of(self, AudioLayer, sizes, audio.layers, self.config)
        x, _ = run(x, None, valid)
        x = (x[:, 0::2] + x[:, 1::2]) / 2
        return nn.LayerNorm(1e-5, use_fast_variance=False, **dtypes, name="norm")(x)


def layer_norm(module: AudioLayer, name: str) -> nn.LayerNorm:
    """LayerNorm in the dtypes of its parent module."""
    return nn.LayerNorm(1e-5, use_fast_variance=False, dtype=module.dtype, param_dtype=module.param_dtype, name=name)
