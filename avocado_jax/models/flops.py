"""The FLOP model: operations and bytes of the thinker, counted from shapes (a multiply-add is two).

Training metrics, `bench`, `plan` and the choice of buckets all use these counts. No device code: sizes are numbers, or
arrays with one entry for each of many rows.
"""

from typing import Any, NamedTuple

from avocado_jax.models.config import ThinkerConfig


class RowFlops(NamedTuple):
    """Forward operations of one row, grouped by what the backward pass needs of them."""

    towers: Any  # encoders: products with weights, and attention
    tower_attention: Any  # the part of `towers` that is attention
    entry: Any  # the encoders' first products: their inputs are data and need no gradient
    adapter_entry: Any  # the first product of each adapter: its inputs need no gradient if encoders are frozen
    adapters: Any  # the rest of the adapters
    layers: Any  # the decoder's products with weights, for clip and captions
    attention: Any  # the decoder's attention: a clip sees half of itself, a caption its clip and half of itself
    logits: Any  # at caption positions

    @property
    def total(self) -> Any:
        """The forward pass."""
        return sum(self) - self.tower_attention


def row_flops(config: ThinkerConfig, shape: Any, group: int, caption: Any) -> RowFlops:
    """Operations of the forward pass of a row.

    Args:
        shape: sizes of the clip as in `data.rows.Shape`: tokens, temporal patches, windows, chunks of sound.
        group: captions of the clip.
        caption: tokens of each.
    """
    tokens, patches, windows, chunks = shape
    vision, audio, text = config.vision, config.audio, config.text
    window = (vision.window_cells * vision.merge) ** 2  # patches
    pixels, frames = patches * windows * window, chunks * audio.window
    cells, merged, pooled = pixels / vision.merge**2, vision.width * vision.merge**2, frames / 2

    full = len(vision.full_layers)
    patch_keys = full * windows * window + (vision.layers - full) * window  # keys of a patch, over all layers
    tower_attention = 4 * vision.width * pixels * patch_keys + 4 * audio.width * audio.window * frames * audio.layers
    towers = 2 * pixels * vision.layers * (4 * vision.width**2 + 3 * vision.width * vision.ffn)
    towers += 2 * frames * audio.layers * (4 * audio.width**2 + 2 * audio.width * audio.ffn)
    towers += 2 * 3 * audio.width**2 * frames  # the second convolution
    entry = 2 * pixels * vision.patch_size * vision.width + 2 * 3 * audio.mel_bins * audio.width * 2 * frames
    adapter_entry = 2 * cells * merged**2 + 2 * pooled * audio.width * audio.out

    of_captions = group * caption
    keys = tokens * tokens / 2 + of_captions * (tokens + caption / 2)
    return RowFlops(
        towers=towers + tower_attention,
        tower_attention=tower_attention,
        entry=entry,
        adapter_entry=adapter_entry,
        adapters=2 * cells * merged * vision.out,
        layers=text.layers * (tokens + of_captions) * 2 * text_layer_parameters(config),
        attention=text.layers * 4 * text.heads * text.head * keys,
        logits=2 * of_captions * text.width * text.vocab,
    )


def train_flops(
    config: ThinkerConfig,
    shape: Any,
    group: int,
    caption: Any,
    trained: str = "captioner",
    recomputed: bool = False,
) -> float:
    """Operations of a training step on one row, forward and backward.

    The gradient of a product's inputs costs its forward pass again, and so does the gradient of its weights; the
    backward pass of attention costs twice its forward pass. Gradients that are not needed are not counted: those of
    frozen encoders and of frozen weights. Embedding, norms, low-rank products and the optimizer are left out.

    Args:
        shape, group, caption: as in `row_flops`.
        trained: the config's `train`: "captioner" (adapters and language model), "all", "adapters", or "lora"
            (adapters, and low-rank updates of frozen decoder weights).
        recomputed: also count what `config.remat` computes a second time. MFU by convention does not (False).
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
    """Operations of the phases of a GRPO step on one row."""

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
    """Operations of a GRPO step on one row: rollout, scores of policy and reference, and `updates` updates.

    The arguments are as in `train_flops`, with `caption` the mean length. Frozen encoders run once.
    """
    row = row_flops(config, shape, group, caption)
    encoders = 0 if trained == "all" else row.towers + row.entry
    each = train_flops(config, shape, group, caption, trained, recomputed) - encoders
    once = row.total - encoders
    return GrpoFlops(encoders, once, ((updates > 1) + reference) * once, updates * each)


def text_layer_parameters(config: ThinkerConfig) -> int:
    """Weights of the matrix products of one decoder layer."""
    t = config.text
    return t.width * t.head * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.ffn


def kv_bytes(config: ThinkerConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return config.text.layers * 2 * config.text.kv_heads * config.text.head * itemsize


def decode_bytes(config: ThinkerConfig, clip: int, group: int, caption: float, itemsize: int) -> float:
    """Bytes that one decoding step of one clip reads: the weights, the clip's cache and each caption's cache so far."""
    weights = config.text.layers * text_layer_parameters(config) + config.text.vocab * config.text.width
    return weights * itemsize + kv_bytes(config, itemsize) * (clip + group * caption)


class Work(NamedTuple):
    """Operations of all devices of a replica, and bytes that one of them reads."""

    flops: float
    bytes: float


def prefill_work(config: ThinkerConfig, shape: Any, itemsize: int, tensor: int = 1) -> Work:
    """Prefill of one clip on `tensor` devices, each of which reads its part of the language model's weights."""
    return Work(row_flops(config, shape, 0, 0).total, decode_bytes(config, 0, 0, 0, itemsize) / tensor)


def decoding_work(config: ThinkerConfig, shape: Any, caption: int, slots: int, itemsize: int, tensor: int = 1) -> Work:
    """One decoding step of `slots` clips with a caption each, of half of `caption` tokens on average."""
    alone, captioned = (row_flops(config, shape, captions, caption).total for captions in (0, 1))
    weights = decode_bytes(config, 0, 0, 0, itemsize)
    caches = decode_bytes(config, shape[0], 1, caption / 2, itemsize) - weights
    read = weights / tensor + slots * caches / min(tensor, config.text.kv_heads)
    return Work(slots * (captioned - alone) / caption, read)
