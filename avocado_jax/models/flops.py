"""Floating-point operations and bytes of the thinker, counted from shapes (a multiply-add is two)."""

from typing import NamedTuple

from avocado_jax.models.config import ThinkerConfig


class RowFlops(NamedTuple):
    """Forward operations of one row, by what the backward pass makes of them."""

    towers: float  # encoders: products with weights, and attention
    tower_attention: float  # the part of `towers` that is attention
    entry: float  # the encoders' first products, whose inputs are data: they need no gradient
    adapter_entry: float  # the first product of each adapter, whose inputs need none where encoders are frozen
    adapters: float  # the rest of the adapters
    layers: float  # the decoder's products with weights, clip and captions
    attention: float  # the decoder's attention: a clip sees half of itself, a caption its clip and half of itself
    logits: float  # at caption positions

    @property
    def total(self) -> float:
        """The whole forward pass."""
        return sum(self) - self.tower_attention


def row_flops(config: ThinkerConfig, shape: tuple[int, int, int, int], group: int, caption: float) -> RowFlops:
    """The forward pass of a row.

    Args:
        shape: sizes of the clip as `data.rows.Shape` has them: tokens, temporal patches, windows, chunks of sound.
        group: captions of the clip.
        caption: tokens of each.
    """
    tokens, patches, windows, chunks = shape
    vision, audio, text = config.vision, config.audio, config.text
    slots = windows * (vision.window_cells * vision.merge) ** 2
    pixels, cells, pooled = patches * slots, patches * slots // vision.merge**2, chunks * audio.window // 2
    merged = vision.width * vision.merge**2
    adapter_entry = 2 * cells * merged**2 + 2 * pooled * audio.width * audio.out
    adapters = 2 * cells * merged * vision.out
    entry = 2 * pixels * vision.patch_size * vision.width
    entry += 2 * 3 * audio.mel_bins * audio.width * 2 * audio.window * chunks
    seen = sum(slots if i in vision.full_layers else slots // max(1, windows) for i in range(vision.layers))
    tower_attention = 4 * vision.width * pixels * seen
    tower_attention += 4 * audio.width * audio.window * audio.window * chunks * audio.layers
    towers = vision_flops(config, patches, slots) + audio_flops(config, chunks) - entry - adapters - adapter_entry
    said = group * caption
    keys = tokens * tokens / 2 + said * (tokens + caption / 2)
    return RowFlops(
        towers=towers,
        tower_attention=tower_attention,
        entry=entry,
        adapter_entry=adapter_entry,
        adapters=adapters,
        layers=text.layers * (tokens + said) * 2 * text_layer_parameters(config),
        attention=text.layers * 4 * text.heads * text.head * keys,
        logits=2 * said * text.width * text.vocab,
    )


def train_flops(
    config: ThinkerConfig,
    shape: tuple[int, int, int, int],
    group: int,
    caption: float,
    trained: str = "captioner",
    recomputed: bool = False,
) -> float:
    """Operations of a training step on one row: forward and backward (`row_flops` names the arguments).

    A product with weights costs its forward again for the gradient of its inputs and again for that of its weights;
    attention costs its forward twice more. What is not needed is not counted: the backward pass of frozen encoders,
    gradients of their outputs, weight gradients of frozen weights. Embedding, norms and the optimizer are left out.

    Args:
        trained: as configs name it: "captioner" (adapters and language model), "all", "adapters", or "lora" (adapters,
            and low-rank updates of frozen decoder weights, whose own few operations are left out).
        recomputed: count also what `config.remat` computes a second time: the machine's work, where MFU is by
            convention the model's (False).
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
    """Operations of the phases of a step of GRPO on one row."""

    encode: float
    rollout: float
    score: float
    update: float


def grpo_flops(
    config: ThinkerConfig,
    shape: tuple[int, int, int, int],
    group: int,
    caption: float,
    trained: str = "captioner",
    updates: int = 1,
    reference: bool = True,
    recomputed: bool = False,
) -> GrpoFlops:
    """Operations of a step of GRPO on one row: rollout, scores of policy and reference, and `updates` of all of it.

    The arguments are as in `train_flops`, with `caption` the mean length. Frozen encoders run once.
    """
    row = row_flops(config, shape, group, caption)
    encoders = 0 if trained == "all" else row.towers + row.entry
    each = train_flops(config, shape, group, caption, trained, recomputed) - encoders
    once = row.total - encoders
    return GrpoFlops(encoders, once, ((updates > 1) + reference) * once, updates * each)


def vision_flops(config: ThinkerConfig, patches: int, slots: int) -> int:
    """The vision tower over `patches` temporal patches of `slots` patches each."""
    v = config.vision
    layer = 8 * v.width**2 + 6 * v.width * v.ffn  # q, k, v, out; gate, up, down
    window = (v.window_cells * v.merge) ** 2
    seen = sum(slots if i in v.full_layers else min(slots, window) for i in range(v.layers))
    merged = 2 * (v.width * v.merge**2) ** 2 // v.merge**2 + 2 * v.width * v.out
    return patches * slots * (2 * v.patch_size * v.width + v.layers * layer + 4 * v.width * seen + merged)


def audio_flops(config: ThinkerConfig, chunks: int) -> int:
    """The sound encoder over chunks of 2 * window mel frames."""
    a = config.audio
    convolutions = 2 * 3 * a.mel_bins * a.width * 2 * a.window + 2 * 3 * a.width**2 * a.window
    layer = a.window * (8 * a.width**2 + 4 * a.width * a.ffn + 4 * a.width * a.window)
    return chunks * (convolutions + a.layers * layer + a.window // 2 * 2 * a.width * a.out)


def text_layer_parameters(config: ThinkerConfig) -> int:
    """Weights of one decoder layer that every token meets."""
    t = config.text
    return t.width * t.head * (2 * t.heads + 2 * t.kv_heads) + 3 * t.width * t.ffn


def text_flops(config: ThinkerConfig, tokens: int, context: float, logits: int) -> float:
    """The language model over `tokens` that each see `context` keys on average, with logits at `logits` of them."""
    t = config.text
    layers = t.layers * (2 * text_layer_parameters(config) + 4 * t.heads * t.head * context)
    return tokens * layers + logits * 2 * t.width * t.vocab


def kv_bytes(config: ThinkerConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return config.text.layers * 2 * config.text.kv_heads * config.text.head * itemsize


def decode_bytes(config: ThinkerConfig, clip: int, group: int, caption: float, itemsize: int) -> float:
    """What one decoding step must read for one clip: weights once, its cache once, each caption's cache so far."""
    weights = config.text.layers * text_layer_parameters(config) + config.text.vocab * config.text.width
    return weights * itemsize + kv_bytes(config, itemsize) * (clip + group * caption)
