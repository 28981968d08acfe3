"""Model configs of the thinker. Imports no jax, so that input workers and the converter can import this module."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder: a Whisper-like transformer over chunks of `2 * window` mel frames."""

    width: int = 1280
    layers: int = 32
    heads: int = 20
    ffn: int = 5120
    mel_bins: int = 128
    window: int = 100  # positions of a chunk after the strided convolution
    out: int = 3584  # width of the language model


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: window attention inside a temporal patch, full attention in some layers."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    ffn: int = 3420
    channels: int = 3
    patch: int = 14  # pixels
    temporal_patch: int = 2  # frames
    merge: int = 2  # side of the square of patches that becomes one token
    window: int = 112  # side of an attention window in pixels
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0
    out: int = 3584
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP, for pixels in [0, 1]
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patch_size(self) -> int:
        """Values of a flattened patch."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def window_cells(self) -> int:
        """Side of a window in merged cells."""
        return self.window // self.patch // self.merge


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the language model's layers."""

    rank: int = 16
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TextConfig:
    """The language model: Qwen2.5 with TMRoPE."""

    vocab: int = 152064
    width: int = 3584
    ffn: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head: int = 128
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_sections: tuple[int, ...] = (16, 24, 24)  # number of rotary frequencies for time, height and width
    tied: bool = False  # whether the output matrix is the embedding
    lora: Lora | None = None  # adapters of a LoRA run; checkpoints are loaded with merged adapters
    int8: bool = False  # kernels of the layers in int8 (models/int8.py); for sampling only


@dataclass(frozen=True)
class TokenIds:
    """Media placeholder ids, from a checkpoint's config.json."""

    audio: int = 151646
    image: int = 151655
    video: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653
    audio_start: int = 151647
    audio_end: int = 151648


class SplashBlocks(NamedTuple):
    """Maximum block sizes (queries and keys per step) of the "splash" kernel; multiples of 128."""

    q: int = 512
    kv: int = 512
    q_backward: int = 512
    kv_backward: int = 512


class Kernel(NamedTuple):
    """An attention kernel and its block sizes."""

    name: str  # one of ATTENTION
    blocks: SplashBlocks = SplashBlocks()


# "auto" selects the platform's kernel: "splash" on TPU, "cudnn" on GPU in half precision, "plain" elsewhere.
ATTENTION = ("auto", "plain", "splash", "cudnn")
# Saved for the backward pass of a layer: everything; its input only; its input and weight products; its input only, in
# host memory.
REMAT = ("none", "full", "dots", "offload")


@dataclass(frozen=True)
class ThinkerConfig:
    """The config of a thinker: encoders and language model, computation settings, and placeholder ids."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tokens: TokenIds = field(default_factory=TokenIds)
    positions_per_second: int = 25
    seconds_per_chunk: int | float = 2
    dtype: str = "float32"  # dtype of activations; reductions are always fp32
    param_dtype: str = "float32"
    scan: bool = True  # stacked layers under a scan (training), or separate layers (decoding)
    attention: str = "auto"  # attention kernel of training and prefill: see ATTENTION
    splash: SplashBlocks = field(default_factory=SplashBlocks)
    remat: str = "full"  # rematerialization: see REMAT

    @property
    def kernel(self) -> Kernel:
        """The attention kernel with its block sizes."""
        return Kernel(self.attention, self.splash)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes as keyword arguments of modules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def __post_init__(self) -> None:
        if not self.text.width == self.audio.out == self.vision.out:
            raise ValueError(
                f"the encoders have output widths {self.audio.out} (audio) and {self.vision.out} (vision), "
                f"the language model has {self.text.width}"
            )
        if min(self.text.heads, self.text.kv_heads, self.audio.heads, self.vision.heads, self.vision.patch) < 1:
            raise ValueError("a number of heads, or the size of a patch, is 0")
        if sum(self.text.mrope_sections) * 2 != self.text.head:
            raise ValueError(f"mrope sections {self.text.mrope_sections} do not fill a head of {self.text.head}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is one of {', '.join(ATTENTION)}, not {self.attention!r}")
        if self.attention == "cudnn" and self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"attention = cudnn needs dtype bfloat16, not {self.dtype}")
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, not {self.remat!r}")


SEVEN_B = ThinkerConfig()
THREE_B = ThinkerConfig(
    audio=AudioConfig(out=2048),
    vision=VisionConfig(out=2048),
    text=TextConfig(vocab=151936, width=2048, ffn=11008, layers=36, heads=16, kv_heads=2),
)
TINY = ThinkerConfig(
    audio=AudioConfig(width=64, layers=2, heads=4, ffn=128, out=64),
    vision=VisionConfig(width=64, layers=3, heads=4, ffn=96, full_layers=(1,), out=64),
    text=TextConfig(vocab=512, width=64, ffn=160, layers=2, heads=4, kv_heads=2, head=32, mrope_sections=(4, 6, 6)),
    tokens=TokenIds(
        audio=259, image=264, video=265, vision_start=262, vision_end=263, audio_start=260, audio_end=261
    ),  # ids of data/tokenizer.py
)
SMALL = ThinkerConfig(
    # Trained from scratch on AVWorld on a CPU, where few wide heads are fastest. The rope base is small, so that heads
    # rotate by at least a third of a radian between adjacent columns. Columns use the lowest frequencies, which would
    # be less than 1e-4 with Qwen's base, and the position of a token in the frame is not encoded otherwise.
    audio=AudioConfig(width=96, layers=2, heads=2, ffn=288, out=128),
    vision=VisionConfig(width=64, layers=2, heads=2, ffn=128, full_layers=(1,), out=128),
    text=TextConfig(
        vocab=1280,
        width=128,
        ffn=256,
        layers=3,
        heads=2,
        kv_heads=1,
        head=64,
        rope_theta=4.0,
        mrope_sections=(8, 12, 12),
    ),
    tokens=TokenIds(
        audio=1273, image=1278, video=1279, vision_start=1276, vision_end=1277, audio_start=1274, audio_end=1275
    ),  # ids of launch/small_checkpoint.py
)
SIZES = {"7b": SEVEN_B, "3b": THREE_B, "small": SMALL, "tiny": TINY}


def computed(config: ThinkerConfig, dtype: str, scan: bool, remat: str = "none") -> ThinkerConfig:
    """The same model with activations and parameters in `dtype`, and stacked (`scan`) or separate layers."""
    return replace(config, dtype=dtype, param_dtype=dtype, scan=scan, remat=remat)
