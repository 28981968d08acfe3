"""The thinker: encoders and language model over a clip and its captions. Logits only at caption positions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from avocado_jax.models.audio import AudioTower
from avocado_jax.models.cache import ClipCache
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.text import TextModel
from avocado_jax.models.vision import VisionTower
from avocado_jax.typing import Array, Bool, Captions, Clip, Float, Int


class Encoded(NamedTuple):
    """Encoder outputs before the adapters. Pass them to skip the encoders."""

    vision: Float[Array, "B T S Y"]  # features of the slots of each temporal patch
    audio: Float[Array, "B A U Y"] | None  # None without sound


class Thinker(nn.Module):
    """Qwen2.5-Omni's thinker for rows of one clip and its G captions (README.md, "A row").

    `__call__` is the training pass. `prefill` and `decode` are for sampling; call them as
    `model.apply({"params": params}, ..., method="prefill")`. With `encoded`, the encoders do not run and their
    parameters may be missing.
    """

    config: ThinkerConfig

    def setup(self) -> None:
        config, text = self.config, self.config.text
        self.audio = AudioTower(config)
        self.vision = VisionTower(config)
        self.text = TextModel(config)
        table = (nn.initializers.normal(0.02), (text.vocab, text.width), jnp.dtype(config.param_dtype))
        self.embedding = self.param("embedding", *table)
        self.head = self.embedding if text.tied else self.param("head", *table)

    def __call__(self, clip: Clip, captions: Captions, encoded: Encoded | None = None) -> Float[Array, "B G C D"]:
        """Normed hidden states at the captions' inputs; their logits predict the targets.

        Clip and captions pass through the layers together, so that each weight is gathered once per pass and its
        gradient is computed once.
        """
        rows, clip_tokens = clip.tokens.shape
        inputs = captions.inputs
        index = jnp.broadcast_to(jnp.arange(inputs.shape[2]), inputs.shape)
        positions = caption_positions(clip.start, index).reshape(rows, -1, 3)
        x, _ = self.text(
            self.embed(clip, encoded, inputs.reshape(rows, -1)),
            jnp.concatenate([clip.positions, positions], axis=1),
            _valid(clip),
            captions=inputs.shape[1:],
        )
        return x[:, clip_tokens:].reshape(*inputs.shape, -1)

    def encode(self, clip: Clip) -> Encoded:
        """Run the encoders, which are frozen in both stages of the paper."""
        rows, patches = clip.tokens.shape[0], clip.patches.shape[1]
        per_frame = (
            jnp.repeat(part[:, None], patches, axis=1).reshape(rows * patches, *part.shape[1:])
            for part in (clip.patch_grid, clip.patch_valid)
        )
        vision = self.vision.encode(clip.patches.reshape(rows * patches, *clip.patches.shape[2:]), *per_frame)
        audio = None
        if clip.mel.shape[1]:  # a batch without sound has no chunks
            chunks = clip.mel.reshape(-1, *clip.mel.shape[2:])
            audio = self.audio.encode(chunks, clip.mel_length.reshape(-1))
        return jax.tree.map(lambda part: part.reshape(rows, -1, *part.shape[1:]), Encoded(vision, audio))

    def embed(
        self, clip: Clip, encoded: Encoded | None = None, inputs: Int[Array, "B Q"] | None = None
    ) -> Float[Array, "B N D"]:
        """Embeddings of [clip; inputs]: media embeddings at the clip's placeholders, token embeddings elsewhere."""
        tokens, clip_tokens = clip.tokens, clip.tokens.shape[1]
        words = self._words(tokens if inputs is None else jnp.concatenate([tokens, inputs], axis=1))
        if not clip.patches.shape[1] and not clip.mel.shape[1]:
            return words
        encoded, rows = encoded or self.encode(clip), clip.tokens.shape[0]
        towers = [(self.vision, encoded.vision)] + [(self.audio, encoded.audio)] * (encoded.audio is not None)
        adapted = [tower.adapt(part.reshape(-1, *part.shape[2:])) for tower, part in towers]
        media = jnp.concatenate([part.reshape(rows, -1, part.shape[-1]) for part in adapted], axis=1)
        placed = jnp.take_along_axis(media, jnp.maximum(clip.media, 0)[..., None], axis=1)
        placed = jnp.where((clip.media >= 0)[..., None], placed, words[:, :clip_tokens])
        return placed if inputs is None else jnp.concatenate([placed, words[:, clip_tokens:]], axis=1)

    def prefill(self, clip: Clip, encoded: Encoded | None = None) -> ClipCache:
        """Compute the KV cache of the clip, shared by any number of captions."""
        _, kv = self.text(self.embed(clip, encoded), clip.positions)
        return ClipCache(kv, _valid(clip), clip.start)

    def decode(
        self, cache: ClipCache, caption_kv: Any, step: Int[Array, "B"] | Int[Array, ""], inputs: Int[Array, "B G"]
    ) -> tuple[Float[Array, "B G V"], Any]:
        """Logits (fp32) of the next token of every caption, and the caption cache with `inputs` written at `step`.

        All captions are at the same step, or each row at its own step if the caches are `Growing`; then their `new` is
        returned.
        """
        index = jnp.broadcast_to(step[..., None, None], (*inputs.shape, 1))
        positions = caption_positions(cache.start, index)[:, :, 0]
        x, caption_kv = self.text(
            self._words(inputs), positions, cache.valid, caches=(cache.layers, caption_kv), step=step
        )
        return self.logits(x), caption_kv

    def logits(self, hidden: Float[Array, "... D"], ids: Int[Array, "V"] | None = None) -> Float[Array, "... V"]:
        """Logits of the next token in fp32, for the full vocabulary or for `ids`."""
        head = self.head if ids is None else self.head[ids]
        return jnp.einsum("...D,VD->...V", hidden, head.astype(self.config.dtype), preferred_element_type=jnp.float32)

    def _words(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)


def output_matrix(config: ThinkerConfig, params: Any) -> Float[Array, "V D"]:
    """The output matrix of `Thinker.logits`."""
    return params["embedding" if config.text.tied else "head"]


def _valid(clip: Clip) -> Bool[Array, "B P"]:
    return jnp.arange(clip.tokens.shape[1])[None] < clip.length[:, None]


def caption_positions(start: Int[Array, "B"], index: Int[Array, "B G Q"]) -> Int[Array, "B G Q 3"]:
    """TMRoPE ids of caption inputs by index. They continue from the last prompt token on all three axes."""
    return jnp.repeat((start[:, None, None] + index)[..., None], 3, axis=-1)


def example(
    config: ThinkerConfig,
    rows: int = 1,
    group: int = 1,
    shape: tuple[int, int, int, int] = (2, 1, 1, 1),
    caption: int = 1,
) -> tuple[Clip, Captions]:
    """A batch as ShapeDtypeStructs. The default sizes suffice for `init` and `eval_shape`.

    Args:
        shape: sizes of the clips as in `data.rows.Shape`: tokens, temporal patches, windows, audio chunks.
        caption: tokens of each of the `group` captions.
    """
    vision, audio = config.vision, config.audio
    tokens, patches, windows, chunks = shape
    slots = (vision.window_cells * vision.merge) ** 2

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    clip = Clip(
        tokens=array(jnp.int32, tokens),
        positions=array(jnp.int32, tokens, 3),
        length=array(jnp.int32),
        media=array(jnp.int32, tokens),
        first=array(jnp.int32),
        start=array(jnp.int32),
        patches=array(jnp.uint8, patches, windows, slots, vision.patch_size),
        patch_grid=array(jnp.int32, windows, slots, 2),
        patch_valid=array(jnp.bool_, windows, slots),
        mel=array(jnp.float32, chunks, 2 * audio.window, audio.mel_bins),
        mel_length=array(jnp.int32, chunks),
    )
    captions = (array(dtype, group, caption) for dtype in (jnp.int32, jnp.int32, jnp.bool_))
    return clip, Captions(*captions)


def init(config: ThinkerConfig, key: jax.Array) -> Any:
    """Random parameters of `config`; only their shapes under `jax.eval_shape`."""
    clip, captions = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example(config))
    return Thinker(config).init(key, clip, captions)["params"]
