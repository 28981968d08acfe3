"""The language model. The same layer is used in prefill, training on [clip; captions], and decoding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from avocado_jax.models.attention import backend, plain
from avocado_jax.models.cache import KV, Growing
from avocado_jax.models.config import Kernel, TextConfig, ThinkerConfig
from avocado_jax.models.layers import GatedMLP, RMSNorm, dense, layer_input, stack_of
from avocado_jax.models.rope import Rope, rotate, text_rope
from avocado_jax.typing import Array, Bool, Float, Int


class TextLayer(nn.Module):
    """One decoder layer of Qwen2.5: q, k and v with bias, o without.

    Attributes:
        captions: (G, C) in training, where a row has the P tokens of a clip followed by the C tokens of each of its G
            captions. None in prefill (clip tokens only) and in decoding (one token per caption).
    """

    text: TextConfig
    kernel: Kernel
    dtype: str
    param_dtype: str
    captions: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        caches: tuple[KV, KV | Growing] | None,
        rope: Rope,
        clip_valid: Bool[Array, "B P"] | None,
        step: Int[Array, "B"] | Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B Q D"], KV | None]:
        """Clip tokens attend causally to the clip; a caption attends to its valid clip tokens and causally to itself.

        Args:
            x: the Q tokens of a row, processed together in every matrix product.
            caches: in decoding, keys and values of the clip, [B K P E], and of previous caption tokens, [B G K S E].
            step: in decoding, the index of the new token of each caption; a scalar unless the cache is `Growing`.

        Returns:
            The output, and keys and values to keep: of the clip (prefill), of the captions (decoding; those of
            `Growing.new`), or None (training).
        """
        text, (rows, tokens, _) = self.text, x.shape
        norms = dict(eps=text.rms_eps, dtype=self.dtype, param_dtype=self.param_dtype)

        x = layer_input(x)
        y = RMSNorm(name="attention_norm", **norms)(x)
        q, k, v = (
            dense(self, heads * text.head, name, text=text)(y).reshape(rows, tokens, heads, text.head)
            for name, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads))
        )
        q, k = rotate(q, rope), rotate(k, rope)
        if caches is not None:
            mixed, kept = _decode(q, k, v, *caches, clip_valid, step)
        else:
            mixed, kept = self._attend(q, k, v, clip_valid)
        mixed = mixed.reshape(rows, tokens, -1)

        x = x + dense(self, text.width, "out", bias=False, text=text)(mixed)
        y = RMSNorm(name="mlp_norm", **norms)(x)
        return x + GatedMLP(text.ffn, False, self.dtype, self.param_dtype, text, name="mlp")(y), kept

    def _attend(
        self,
        q: Float[Array, "B Q H E"],
        k: Float[Array, "B Q K E"],
        v: Float[Array, "B Q K E"],
        clip_valid: Bool[Array, "B P"] | None,
    ) -> tuple[Float[Array, "B Q H E"], KV | None]:
        """Attention in training and prefill. Returns the clip's keys and values only in prefill."""
        kernel = backend(self.kernel, self.dtype)
        rows, (group, length) = len(q), self.captions or (0, 0)
        end = q.shape[1] - group * length
        clip = KV(*(part[:, :end].swapaxes(1, 2) for part in (k, v)))
        mixed = kernel.attend_clip(q[:, :end], clip)
        if self.captions is None:
            return mixed, clip
        q, k, v = (part[:, end:].reshape(rows, group, length, *part.shape[2:]) for part in (q, k, v))
        caption_kv = KV(*(part.swapaxes(2, 3) for part in (k, v)))
        captions = kernel.attend_captions(q, caption_kv, clip, clip_valid)
        return jnp.concatenate([mixed, captions.reshape(rows, group * length, *captions.shape[3:])], axis=1), None


def _decode(
    q: Float[Array, "B G H E"],
    k: Float[Array, "B G K E"],
    v: Float[Array, "B G K E"],
    clip: KV,
    captions: KV | Growing,
    clip_valid: Bool[Array, "B P"],
    step: Int[Array, "B"] | Int[Array, ""],
) -> tuple[Float[Array, "B G H E"], KV]:
    """Attention of one token per caption. Also returns the captions' cache with this token."""
    token = KV(k[..., None, :], v[..., None, :])
    if isinstance(captions, Growing):
        kept = captions.new.write(token, captions.count)
        begun = jnp.arange(captions.old.k.shape[3])[None] < captions.begun[:, None]
        parts = [(captions.old, begun), (kept, _causal_mask(captions.count, kept))]
    else:
        kept = captions.write(token, step)
        parts = [(kept, _causal_mask(step, kept))]
    return plain.attend_step(q, parts, clip, clip_valid), kept


def _causal_mask(step: Int[Array, ""], kv: KV) -> Bool[Array, "1 S"]:
    return (jnp.arange(kv.k.shape[3]) <= step)[None]


class TextModel(nn.Module):
    """The decoder layers and the final norm."""

    config: ThinkerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B Q 3"],
        clip_valid: Bool[Array, "B P"] | None = None,
        captions: tuple[int, int] | None = None,
        caches: tuple[Any, Any] | None = None,
        step: Int[Array, "B"] | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B Q D"], Any]:
        """Normed hidden states, and the keys and values of all layers, in the layout of `ClipCache.layers`.

        For the arguments see `TextLayer`; `caches` are those of all layers.
        """
        config, text = self.config, self.config.text
        rope = text_rope(positions, text.head, text.rope_theta, text.mrope_sections)
        rope = Rope(*(part.astype(config.dtype) for part in rope))

        if caches is not None and not config.scan:
            caches = list(zip(*caches))
        sizes = dict(text=text, kernel=config.kernel, captions=captions, **config.dtypes)
        x, kept = stack_of(self, TextLayer, sizes, text.layers, config)(x, caches, rope, clip_valid, step)
        return RMSNorm(name="norm", eps=text.rms_eps, **config.dtypes)(x), kept
