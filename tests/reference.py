"""The torch reference (transformers' Qwen2.5-Omni thinker) with random weights, and batches for both sides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from avocado_jax.checkpoint.hf_config import config_json
from avocado_jax.data.media import Media
from avocado_jax.data.prompt import Prompt
from avocado_jax.data.rows import Row, make_row
from avocado_jax.models.config import ThinkerConfig

BEFORE, AFTER = [257, 82, 10, 258, 10, 257, 85, 10], [66, 67, 68, 69, 70, 71, 258, 10, 257, 65, 10]
PROMPT = Prompt(BEFORE, AFTER)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Randomise: O(1) activations, non-zero biases, norm scales other than one, so that all parameters matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                value.copy_(noise * (1.0 if "embed" in name else value[0].numel() ** -0.5))


def write_reference(folder: Path, config: ThinkerConfig, seed: int = 0) -> None:
    """Save a random checkpoint with transformers."""
    model = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig.from_dict(config_json(config)))
    randomise(model, seed)
    model.save_pretrained(folder)


def load_reference(folder: Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Load a checkpoint with the reference, in fp32."""
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def random_media(frames: int, height: int, width: int, samples: int | None, seed: int = 0) -> Media:
    """A clip of noise at a size that needs no resizing."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    sound = None if samples is None else rng.standard_normal(samples).astype(np.float32) * 0.1
    return Media(pictures, sound, frames / 2)


def rows_of(media: list[Media], config: ThinkerConfig) -> list[Row]:
    """Our rows of clips, under one prompt."""
    return [make_row(one, PROMPT, config) for one in media]


def inputs_of(
    media: list[Media], rows: list[Row], config: ThinkerConfig, captions: list[list[int]] | None = None
) -> Mapping[str, Any]:
    """The reference's batch of the same clips, left-padded; `captions`, one a row, follow their prompts."""
    ids = [row.prompt_ids.tolist() + (captions[i] if captions else []) for i, row in enumerate(rows)]
    longest = max(map(len, ids))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (longest - len(one)) + one for one in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
        "pixel_values_videos": torch.cat([torch.tensor(_patches(one.frames, config)) for one in media]),
        "video_grid_thw": torch.tensor([_grid(one.frames, config) for one in media]),
        "video_second_per_grid": torch.ones(len(media)),
        "use_audio_in_video": False,
    }
    mels = [row.clip.mel.reshape(-1, config.audio.mel_bins)[: row.clip.mel_length.sum()] for row in rows]
    mels = [mel for mel in mels if len(mel)]
    if mels:
        inputs["use_audio_in_video"] = True
        most = max(map(len, mels))
        inputs["input_features"] = torch.stack(
            [torch.tensor(np.pad(mel, ((0, most - len(mel)), (0, 0)))).T for mel in mels]
        )
        inputs["feature_attention_mask"] = torch.tensor([[1] * len(mel) + [0] * (most - len(mel)) for mel in mels])
    return inputs


def _grid(frames: np.ndarray, config: ThinkerConfig) -> list[int]:
    vision = config.vision
    return [-(-len(frames) // 2), frames.shape[1] // vision.patch, frames.shape[2] // vision.patch]


def _patches(frames: np.ndarray, config: ThinkerConfig) -> np.ndarray:
    """The reference's flattened patches (t, h/2, w/2, 2, 2, C, T, 14, 14), normalised, written out."""
    vision = config.vision
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    times, high, wide = _grid(frames, config)
    mean, std = (255 * np.array(part, np.float32) for part in (vision.pixel_mean, vision.pixel_std))
    x = ((frames.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    x = x.reshape(times, 2, 3, high // 2, 2, vision.patch, wide // 2, 2, vision.patch)
    return x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * high * wide, -1)
