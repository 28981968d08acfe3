"""A sentence encoder: BERT (Devlin et al., 2019) with the last layer pooled to a unit vector (Sentence-BERT)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from avocado_jax.models.attention import plain
from avocado_jax.models.layers import dense, gelu
from avocado_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of all-MiniLM-L6-v2."""

    vocab: int = 30522
    width: int = 384
    ffn: int = 1536
    layers: int = 6
    heads: int = 12
    positions: int = 512  # maximum tokens of a text
    kinds: int = 2  # segment types; texts use type 0
    eps: float = 1e-12
    pool: str = "mean"  # "mean": mean of the valid tokens; "first": the first token
    dtype: str = "float32"
    param_dtype: str = "float32"


class EncoderLayer(nn.Module):
    """Post-norm transformer layer with bidirectional attention over valid tokens."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        config = self.config
        q, k, v = (
            dense(config, config.width, name)(x).reshape(*x.shape[:2], config.heads, -1) for name in ("q", "k", "v")
        )
        mixed = plain.attend_block(q, k, v, valid).reshape(x.shape)
        x = layer_norm(config, "attention_norm")(x + dense(config, config.width, "out")(mixed))
        y = dense(config, config.width, "down")(gelu(dense(config, config.ffn, "up")(x)))
        return layer_norm(config, "mlp_norm")(x + y)


class Encoder(nn.Module):
    """Encodes texts to unit vectors, whose inner products measure semantic similarity."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B S"], valid: Bool[Array, "B S"]) -> Float[Array, "B D"]:
        """Encode B texts, including start and end tokens. A text without a valid token gives zeros."""
        config = self.config
        words, places, kinds = (
            self.param(name, nn.initializers.normal(0.02), (rows, config.width), jnp.dtype(config.param_dtype))
            for name, rows in (("words", config.vocab), ("places", config.positions), ("kinds", config.kinds))
        )
        index = jnp.minimum(jnp.arange(tokens.shape[1]), config.positions - 1)  # only padding exceeds the maximum
        x = (words[tokens] + places[index][None] + kinds[:1, None]).astype(config.dtype)
        x = layer_norm(config, "norm")(x)
        for layer in range(config.layers):
            x = EncoderLayer(config, name=f"layers_{layer}")(x, valid)
        x = x.astype(jnp.float32)
        if config.pool == "mean":
            x = jnp.sum(x, axis=1, where=valid[..., None]) / jnp.maximum(1, jnp.sum(valid, axis=1))[:, None]
        else:
            x = jnp.where(valid[:, :1], x[:, 0], 0)
        return x / jnp.maximum(1e-12, jnp.linalg.norm(x, axis=-1, keepdims=True))


def layer_norm(config: EncoderConfig, name: str) -> nn.LayerNorm:
    """LayerNorm in the dtypes of the encoder."""
    dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    return nn.LayerNorm(config.eps, use_fast_variance=False, **dtypes, name=name)
