"""The language model: a layer serves the clip, its captions in training, and one token a caption in decoding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from avocado_jax.models.attention import backend, plain
from avocado_jax.models.cache import KV, ClipCache
from avocado_jax.models.config import TextConfig, ThinkerConfig
from avocado_jax.models.layers import GatedMLP, RMSNorm, dense, layer_input, stack_of
from avocado_jax.models.rope import Rope, rotate, text_rope
from avocado_jax.typing import Array, Bool, Float, Int


class TextLayer(nn.Module):
    """One decoder layer: q, k, v with bias, o without (Qwen2.5)."""

    text: TextConfig
    attention: str
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B G Q D"],
        own: tuple[KV | None, KV | None],
        rope: Rope,
        clip_valid: Bool[Array, "B P"] | None,
        step: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B G Q D"], KV]:
        """Queries see their own sequence causally and, where there is one, all valid tokens of the clip.

        `own` is this layer's (clip, captions so far): the clip's keys and values, [B K P E], and the
        decoding cache, [B G K S E], in which the one new token lands at `step`. Returns the output and
        the keys and values of the sequence itself.
        """
        text, (rows, group, queries, _) = self.text, x.shape
        clip, so_far = own
        norms = dict(eps=text.rms_eps, dtype=self.dtype, param_dtype=self.param_dtype)

        x = layer_input(x)
        y = RMSNorm(name="attention_norm", **norms)(x)
        q, k, v = (
            dense(self, heads * text.head, name, lora=text.lora)(y).reshape(rows, group, queries, heads, text.head)
            for name, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads))
        )
        kv = KV(*(part.swapaxes(2, 3) for part in (rotate(k, rope), v)))
        if so_far is not None:
            kv = so_far.write(kv, step)
        q = rotate(q, rope)

        kernel = backend(self.attention, self.dtype)
        if clip is None:  # the clip itself, a group of one
            mixed = kernel.attend_clip(q[:, 0], KV(*(part[:, 0] for part in kv)))
        elif so_far is None:
            mixed = kernel.attend_captions(q, kv, clip, clip_valid)
        else:  # one token of each caption: decoding is plain everywhere
            mixed = plain.attend_captions(q, kv, clip, clip_valid, jnp.arange(kv.k.shape[3]) <= step)
        mixed = mixed.reshape(rows, group, queries, -1)

        x = x + dense(self, text.width, "out", bias=False, lora=text.lora)(mixed)
        y = RMSNorm(name="mlp_norm", **norms)(x)
        return x + GatedMLP(text.ffn, False, self.dtype, self.param_dtype, text.lora, name="mlp")(y), kv


class TextModel(nn.Module):
    """The stack of decoder layers between embeddings and the final norm."""

    config: ThinkerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B G Q D"],
        positions: Int[Array, "B G Q 3"],
        clip: ClipCache | None = None,
        so_far: Any = None,
        step: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B G Q D"], Any]:
        """Normed hidden states, and every layer's keys and values (see `cache.ClipCache` for the layout).

        Without `clip` this is the prefill of a clip (G = 1); with it, captions in parallel; with `so_far`
        and `step` too, one more token of each caption.
        """
        config, text = self.config, self.config.text
        rope = text_rope(positions, text.head, text.rope_theta, text.mrope_sections)
        rope = Rope(*(part.astype(config.dtype) for part in rope))

        own = (clip and clip.layers, so_far)
        if not config.scan:
            own = list(zip(*(part or [None] * text.layers for part in own)))
        run = stack_of(TextLayer, dict(text=text, attention=config.attention, **config.dtypes), text.layers, config)
        x, kv = run(x, own, rope, clip and clip.valid, step)
        return RMSNorm(name="norm", eps=text.rms_eps, **config.dtypes)(x), kv
