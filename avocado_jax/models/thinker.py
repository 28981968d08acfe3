"""The thinker: towers, the clip's tokens, its captions. Logits exist at caption positions only."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from avocado_jax.models.audio import AudioTower
from avocado_jax.models.cache import ClipCache
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.text import TextModel
from avocado_jax.models.vision import VisionTower
from avocado_jax.typing import Array, Captions, Clip, Float, Int


class Encoded(NamedTuple):
    """A clip as the encoders see it, before the adapters. It takes the place of encoding it again (`prefill`)."""

    seen: Float[Array, "B T S Y"]  # slots of each temporal patch
    heard: Float[Array, "B A U Y"] | None  # None without sound


class Thinker(nn.Module):
    """Qwen2.5-Omni's thinker for rows of one clip and its G captions (README, "A row").

    Methods are called as `model.apply({"params": params}, ..., method="prefill")`. Given `encoded`, the encoders do not
    run and their parameters may be missing.
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
        """Normed hidden states at the captions' inputs, [B G C D]: `logits` of them predict the targets."""
        return self.continue_captions(self.prefill(clip, encoded), clip, captions.inputs)

    def encode(self, clip: Clip) -> Encoded:
        """What the encoders make of the clip: the part of the model that is frozen in both of the paper's stages."""
        rows, patches = clip.tokens.shape[0], clip.patches.shape[1]
        per_frame = (
            jnp.repeat(part[:, None], patches, axis=1).reshape(rows * patches, *part.shape[1:])
            for part in (clip.patch_grid, clip.patch_valid)
        )
        seen = self.vision.encode(clip.patches.reshape(rows * patches, *clip.patches.shape[2:]), *per_frame)
        heard = None
        if clip.mel.shape[1]:  # a batch without any sound has no chunk to encode
            chunks = clip.mel.reshape(-1, *clip.mel.shape[2:])
            heard = self.audio.encode(chunks, clip.mel_length.reshape(-1))
        return jax.tree.map(lambda part: part.reshape(rows, -1, *part.shape[1:]), Encoded(seen, heard))

    def embed(self, clip: Clip, encoded: Encoded | None = None) -> Float[Array, "B P D"]:
        """The clip's tokens with picture and sound in their places, [B P D]."""
        encoded, rows = encoded or self.encode(clip), clip.tokens.shape[0]
        towers = [(self.vision, encoded.seen)] + [(self.audio, encoded.heard)] * (encoded.heard is not None)
        adapted = [tower.adapt(part.reshape(-1, *part.shape[2:])) for tower, part in towers]
        media = jnp.concatenate([part.reshape(rows, -1, part.shape[-1]) for part in adapted], axis=1)
        placed = jnp.take_along_axis(media, jnp.maximum(clip.media, 0)[..., None], axis=1)
        return jnp.where((clip.media >= 0)[..., None], placed, self._words(clip.tokens))

    def prefill(self, clip: Clip, encoded: Encoded | None = None) -> ClipCache:
        """Read the clip once: every layer's keys and values, for any number of captions."""
        x, positions = self.embed(clip, encoded)[:, None], clip.positions[:, None]
        _, kv = self.text(x, positions)
        kv = jax.tree.map(lambda part: part.squeeze(-4), kv)  # the clip is a group of one
        return ClipCache(kv, jnp.arange(clip.tokens.shape[1]) < clip.length[:, None])

    def continue_captions(self, cache: ClipCache, clip: Clip, inputs: Int[Array, "B G C"]) -> Float[Array, "B G C D"]:
        """Normed hidden states of captions in parallel, behind their clip; the first input is `clip.first`."""
        positions = caption_positions(clip, jnp.broadcast_to(jnp.arange(inputs.shape[2]), inputs.shape))
        x, _ = self.text(self._words(inputs), positions, cache)
        return x

    def decode(
        self, cache: ClipCache, clip: Clip, so_far: Any, step: Int[Array, ""], inputs: Int[Array, "B G"]
    ) -> tuple[Float[Array, "B G V"], Any]:
        """One token of every caption: its logits in fp32, and the caption cache with it written at `step`."""
        positions = caption_positions(clip, jnp.broadcast_to(step, (*inputs.shape, 1)))
        x, so_far = self.text(self._words(inputs[..., None]), positions, cache, so_far, step)
        return self.logits(x[:, :, 0]), so_far

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token, fp32."""
        return jnp.einsum(
            "...D,VD->...V", hidden, self.head.astype(self.config.dtype), preferred_element_type=jnp.float32
        )

    def _words(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)


def caption_positions(clip: Clip, index: Int[Array, "B G Q"]) -> Int[Array, "B G Q 3"]:
    """TMRoPE ids of caption inputs by their index: they count on from the last prompt token, on all axes."""
    return jnp.repeat((clip.start[:, None, None] + index)[..., None], 3, axis=-1)


def example(
    config: ThinkerConfig,
    rows: int = 1,
    group: int = 1,
    shape: tuple[int, int, int, int] = (2, 1, 1, 1),
    caption: int = 1,
) -> tuple[Clip, Captions]:
    """A batch as shapes and dtypes; the smallest is what `init` and `eval_shape` need to know the parameters.

    Args:
        shape: sizes of the clips as `data.rows.Shape` has them: tokens, temporal patches, windows, chunks of sound.
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
    """Random parameters of `config`. Under `jax.eval_shape` this costs nothing at any size."""
    clip, captions = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example(config))
    return Thinker(config).init(key, clip, captions)["params"]
