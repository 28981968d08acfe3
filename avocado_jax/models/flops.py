"""Floating-point operations and bytes of the thinker, counted from shapes (a multiply-add is two)."""

from avocado_jax.models.config import ThinkerConfig


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
