"""FLOPs and bytes of the thinker, computed from shapes (a multiply-add is two FLOPs).

Training metrics, `bench`, `plan` and the choice of buckets use these counts. No device code: sizes are numbers, or
arrays with one entry per row.
"""

from typing import Any, NamedTuple

from avocado_jax.models.config import ThinkerConfig


class RowFlops(NamedTuple):
    """Forward FLOPs of one row, grouped by their cost in the backward pass."""

    towers: Any  # encoders: weight products and attention
    tower_attention: Any  # the attention part of `towers`
    entry: Any  # first products of the encoders, whose inputs are data and need no gradient
    adapter_entry: Any  # first product of each adapter, whose inputs need no gradient with frozen encoders
    adapters: Any  # other products of the adapters
    layers: Any  # weight products of the decoder, for clip and captions
    attention: (
        Any  # attention of the decoder: causal over the clip; captions over their clip and causal over themselves
    )
    logits: Any  # output matrix at caption positions

    @property
    def total(self) -> Any:
        """FLOPs of the forward pass."""
        return sum(self) - self.tower_attention


def row_flops(config: ThinkerConfig, shape: Any, group: int, caption: Any) -> RowFlops:
    """FLOPs of the forward pass of a row.

    Args:
        shape: sizes of the clip as in `data.rows.Shape`: tokens, temporal patches, windows, audio chunks.
        group: captions of the clip.
        caption: tokens of each caption.
    """
    tokens, patches, windows, chunks = shape
    vision, audio, text = config.vision, config.audio, config.text
    window = (vision.window_cells * vision.merge) ** 2  # patches
    pixels, frames = patches * windows * window, chunks * audio.window
    cells, merged, pooled = pixels / vision.merge**2, vision.width * vision.merge**2, frames / 2

    full = len(vision.full_layers)
    patch_keys = full * windows * window + (vision.layers - full) * window  # keys per patch, summed over layers
    tower_attention = 4 * vision.width * pixels * patch_keys + 4 * audio.width * audio.window * frames * audio.layers
    towers = 2 * pixels * vision.layers * (4 * vision.width**2 + 3 * vision.width * vision.ffn)
    towers += 2 * frames * audio.layers * (4 * audio.width**2 + 2 * audio.width * audio.ffn)
    towers += 2 * 3 * audio.width**2 * frames  # the second convolution
    entry = 2 * pixels * vision.patch_size * vision.width + 2 * 3 * audio.mel_bins * audio.width * 2 * frames
    adapter_entry = 2 * cells * merged**2 + 2 * pooled * audio.width * audio.out

    caption_tokens = group * caption
    keys = tokens * tokens / 2 + caption_tokens * (tokens + caption / 2)
    return RowFlops(
        towers=towers + tower_attention,
        tower_attention=tower_attention,
        entry=entry,
        adapter_entry=adapter_entry,
        adapters=2 * cells * merged * vision.out,
        layers=text.layers * (tokens + caption_tokens) * 2 * text_layer_parameters(config),
        attention=text.layers * 4 * text.heads * text.head * keys,
        logits=2 * caption_tokens * text.width * text.vocab,
    )


def train_flops(
    config: ThinkerConfig,
    shape: Any,
    group: int,
    caption: Any,
    trained: str = "captioner",
    recomputed: bool = False,
) -> float:
    """FLOPs of a training step on one row, forward and backward.

    The gradients of a product's inputs and of its weights each cost as much as its forward pass. The backward pass of
    attention costs twice its forward pass. Gradients of frozen encoders and frozen weights are not counted. Embedding,
    norms, low-rank products and the optimizer are excluded.

    Args:
        shape, group, caption: see `row_flops`.
        trained: the config's `train`: "captioner" (adapters and language model), "all", "adapters", or "lora"
            (adapters, and low-rank updates of frozen decoder weights).
        recomputed: include the recomputation of `config.remat`. Excluded from MFU by convention.
    """
    row = row_flops(config, shape, group, caption)
    flops = 2 * row.adapter_entry + 3 * row.adapters + 3 * row.attention
    flops += (3 if trained in ("captioner", "all") else 2) * (row.layers + row.logits)
    if trained == "all":
        flops += 3 * row.towers + 2 * row.entry + row.adapter_entry
    else:
        flops += row.towers + row.entry
    if recomputed and config.remat != "none":
        attention = row.attention + (row.tower_attention if trained == "all" else 0)
        products = row.layers + (row.towers - row.tower_attention if trained == "all" else 0)
        flops += attention + (0 if config.remat == "dots" else products)
    return flops


class GrpoFlops(NamedTuple):
    """FLOPs of the phases of a GRPO step on one row."""

    encode: float
    rollout: float
    score: float
    update: float


def grpo_flops(
    config: ThinkerConfig,
    shape: Any,
    group: int,
    caption: Any,
    trained: str = "captioner",
    updates: int = 1,
    reference: bool = True,
    recomputed: bool = False,
) -> GrpoFlops:
    """FLOPs of a GRPO step on one row: rollout, scores of policy and reference, and `updates` updates.

    For the arguments see `train_flops`; `caption` is the mean length. Frozen encoders run once.
    """
    row = row_flops(config, shape, group, caption)
    encoders = 0 if trained == "all" else row.towers + row.entry
    update = train_flops(config, shape, group, caption, trained, recomputed) - encoders
    forward = row.total - encoders
    return GrpoFlops(encoders, forward, ((updates > 1) + reference) * forward, updates * update)


def text_layer_parameters(config: ThinkerConfig) -> int:
    """The number of matrix weights of a decoder layer."""
    t = config.text
    return t.width * t.head * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.ffn


def kv_bytes(config: ThinkerConfig, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return config.text.layers * 2 * config.text.kv_heads * config.text.head * itemsize


def decode_bytes(config: ThinkerConfig, clip: int, group: int, caption: float, itemsize: int) -> float:
    """Bytes read by a decoding step of one clip: the weights, the clip's cache and the captions' caches."""
    weights = config.text.layers * text_layer_parameters(config) + config.text.vocab * config.text.width
    return weights * itemsize + kv_bytes(config, itemsize) * (clip + group * caption)


class Work(NamedTuple):
    """FLOPs of all devices of a replica, and bytes read by one device."""

    flops: float
    bytes: float


def prefill_work(config: ThinkerConfig, shape: Any, itemsize: int, tensor: int = 1) -> Work:
    """Work of the prefill of one clip on `tensor` devices, each of which reads its shard of the weights."""
    return Work(row_flops(config, shape, 0, 0).total, decode_bytes(config, 0, 0, 0, itemsize) / tensor)


def decoding_work(config: ThinkerConfig, shape: Any, caption: int, slots: int, itemsize: int, tensor: int = 1) -> Work:
    """Work of a decoding step of `slots` clips with one caption each, with a mean of `caption` / 2 tokens."""
    alone, captioned = (row_flops(config, shape, captions, caption).total for captions in (0, 1))
    weights = decode_bytes(config, 0, 0, 0, itemsize)
    caches = decode_bytes(config, shape[0], 1, caption / 2, itemsize) - weights
    read = weights / tensor + slots * caches / min(tensor, config.text.kv_heads)
    return Work(slots * (captioned - alone) / caption, read)
