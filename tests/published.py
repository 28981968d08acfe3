"""Write a checkpoint folder in the published form of AVoCaDO, with small random weights.

1,346 tensors, all named `thinker.*`, in four shards with an index; talker and token2wav configs without weights; a
generation config without fields; `spk_dict.pt`; no `video_preprocessor_config.json`.
"""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from transformers import Qwen2_5OmniConfig

from avocado_jax.checkpoint.hf import UNUSED, table
from avocado_jax.checkpoint.hf_config import config_json
from avocado_jax.checkpoint.safetensors import Spec, write_shards
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.models.config import SEVEN_B, TINY, ThinkerConfig

PUBLISHED = replace(
    TINY,
    audio=replace(TINY.audio, layers=SEVEN_B.audio.layers),
    vision=replace(TINY.vision, layers=SEVEN_B.vision.layers, full_layers=SEVEN_B.vision.full_layers),
    text=replace(TINY.text, layers=SEVEN_B.text.layers),
)


def write_published(folder: Path, config: ThinkerConfig = PUBLISHED, seed: int = 0) -> Path:
    """Write the folder, in bf16."""
    folder.mkdir(parents=True)
    rng, dtype = np.random.default_rng(seed), np.dtype(ml_dtypes.bfloat16)
    shapes = {name: entry.shape for name, entry in table(config).items()} | {UNUSED: (2, config.audio.out)}
    specs = [Spec(f"thinker.{name}", dtype, shape) for name, shape in shapes.items()]

    def value(spec: Spec) -> np.ndarray:
        noise = rng.standard_normal(spec.shape)
        if len(spec.shape) == 1:
            return (0.3 * noise + ("norm" in spec.name or "ln_" in spec.name)).astype(dtype)
        return (noise * (1.0 if "embed" in spec.name else np.prod(spec.shape[1:]) ** -0.5)).astype(dtype)

    total = sum(spec.nbytes for spec in specs)
    write_shards(folder, specs, map(value, specs), total // 4 + max(spec.nbytes for spec in specs))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    full = Qwen2_5OmniConfig(
        talker_config={**small, "num_key_value_heads": 1, "head_dim": 16, "embedding_size": 64, "vocab_size": 100},
        token2wav_config={
            "dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1},
            "bigvgan_config": {"upsample_initial_channel": 64},
        },
    ).to_dict()
    fields = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "enable_talker": False,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "thinker_config": config_json(config) | {"torch_dtype": "bfloat16"},
        "talker_config": full["talker_config"],
        "token2wav_config": full["token2wav_config"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.3",
    }
    processor = {"min_pixels": 3136, "max_pixels": 12845056, "chunk_length": 300, "feature_size": 128}
    files = {
        "config.json": fields,
        "generation_config.json": {"_from_model_config": True, "transformers_version": "4.52.3"},
        "preprocessor_config.json": processor | {"processor_class": "Qwen2_5OmniProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    write_tokenizer(folder)
    torch.save({"Ethan": {"cond": torch.ones(1, 3)}, "Chelsie": {"cond": torch.ones(1, 3)}}, folder / "spk_dict.pt")
    (folder / "README.md").write_text("# AVoCaDO")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return folder
