"""Convert the config.json of a Qwen2.5-Omni checkpoint, in the format of transformers 4 or 5, to `ThinkerConfig`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avocado_jax.errors import InputError
from avocado_jax.models.config import AudioConfig, TextConfig, ThinkerConfig, TokenIds, VisionConfig

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
TEXT_MODEL = "qwen2"


class _Section:
    """An object of config.json. Errors about missing or invalid fields contain the path."""

    def __init__(self, fields: Any, path: str):
        if not isinstance(fields, Mapping):
            raise InputError(f"config.json: '{path}' is missing or not an object")
        self.fields, self.path = fields, path

    def get(self, *names: str, kind: type | tuple[type, ...] = int, default: Any = None) -> Any:
        """The value of the first existing name."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or not self._sound(value):
                    raise InputError(f"config.json: {self.path}.{name} is {value!r}")
                return value
        if default is None:
            raise InputError(f"config.json: {self.path} lacks '{names[0]}'")
        return default

    @staticmethod
    def _sound(value: Any) -> bool:
        """Check that numbers are not negative and lists contain non-negative integers."""
        if isinstance(value, list | tuple):
            return all(type(item) is int and item >= 0 for item in value)
        return isinstance(value, bool | str) or value >= 0

    def within(self, name: str) -> "_Section":
        """The object under `name`."""
        return _Section(self.fields.get(name), f"{self.path}.{name}")


def read_config(config: Any, tied: bool) -> ThinkerConfig:
    """Read the config.json of a full Omni checkpoint or of a thinker.

    Fields that older files omit default to the values of all published checkpoints; sizes are required.

    Args:
        tied: whether the checkpoint has no separate output matrix, determined from its tensors.

    Raises:
        InputError: a field is missing, has the wrong type, or has a value that is not implemented.
    """
    if not isinstance(config, Mapping):
        raise InputError("config.json: not an object")
    if config.get("model_type") not in MODEL_TYPES:
        raise InputError(f"config.json: model_type is {config.get('model_type')!r}, not a Qwen2.5-Omni checkpoint")
    top = _Section(config, "config")
    thinker = top.within("thinker_config") if "thinker_config" in config else top
    text, vision, audio = (thinker.within(f"{part}_config") for part in ("text", "vision", "audio"))
    for section, name, known in ((vision, "hidden_act", "silu"), (audio, "activation_function", "gelu")):
        _activation(section, name, known)
    try:
        return ThinkerConfig(
            audio=_audio(audio),
            vision=_vision(vision),
            text=_text(text, tied),
            tokens=_tokens(thinker),
            positions_per_second=thinker.get("position_id_per_seconds"),
            seconds_per_chunk=thinker.get("seconds_per_chunk", kind=(int, float)),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"config.json: {error}") from error


def read_text_config(config: Any, tied: bool) -> ThinkerConfig:
    """Read the config.json of a text model (Qwen2) as a thinker without encoders.

    Raises:
        InputError: see `read_config`.
    """
    section = _Section(config, "config")
    if section.fields.get("model_type") != TEXT_MODEL:
        raise InputError(f"config.json: model_type is {section.fields.get('model_type')!r}, not '{TEXT_MODEL}'")
    try:
        text = _text(section, tied, line=True)
        return ThinkerConfig(audio=AudioConfig(out=text.width), vision=VisionConfig(out=text.width), text=text)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"config.json: {error}") from error


def _activation(section: _Section, name: str, known: str) -> None:
    if section.get(name, kind=str, default=known) != known:
        raise InputError(f"config.json: {section.path}.{name} is not '{known}'")


def says_tied(config: Any) -> bool:
    """Whether a config.json declares tied embeddings, so that the output matrix may be missing."""
    sections = [config]
    for name in ("thinker_config", "text_config"):
        sections += [section[name] for section in sections if isinstance(section, dict) and name in section]
    return any(isinstance(section, dict) and section.get("tie_word_embeddings") is True for section in sections)


def _audio(audio: _Section) -> AudioConfig:
    return AudioConfig(
        width=audio.get("d_model"),
        layers=audio.get("encoder_layers", "num_hidden_layers"),
        heads=audio.get("encoder_attention_heads"),
        ffn=audio.get("encoder_ffn_dim"),
        mel_bins=audio.get("num_mel_bins"),
        window=audio.get("n_window"),
        out=audio.get("output_dim"),
    )


def _vision(vision: _Section) -> VisionConfig:
    return VisionConfig(
        width=vision.get("hidden_size", "embed_dim"),
        layers=vision.get("depth"),
        heads=vision.get("num_heads"),
        ffn=vision.get("intermediate_size"),
        channels=vision.get("in_channels", "in_chans"),
        patch=vision.get("patch_size", "spatial_patch_size"),
        temporal_patch=vision.get("temporal_patch_size"),
        merge=vision.get("spatial_merge_size"),
        window=vision.get("window_size"),
        full_layers=tuple(vision.get("fullatt_block_indexes", kind=(list, tuple))),
        rope_theta=float(_rope(vision).get("rope_theta", 10000.0)),
        out=vision.get("out_hidden_size"),
    )


def _text(text: _Section, tied: bool, line: bool = False) -> TextConfig:
    """`line`: a text model with 1D positions, for which all frequencies use the first axis."""
    kinds = text.fields.get("layer_types") or []
    if text.get("use_sliding_window", kind=bool, default=False) or "sliding_attention" in kinds:
        raise InputError("config.json: sliding window attention is not implemented")
    _activation(text, "hidden_act", "silu")
    rope = _rope(text)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise InputError(f"config.json: rope type '{kind}' is not implemented")
    width, heads = text.get("hidden_size"), text.get("num_attention_heads")
    theta = rope.get("rope_theta", text.fields.get("rope_theta"))
    if not isinstance(theta, int | float):
        raise InputError(f"config.json: {text.path} lacks 'rope_theta'")
    head = text.get("head_dim", default=width // heads)
    sections = [head // 2, 0, 0] if line else _Section(rope, f"{text.path}.rope").get("mrope_section", kind=list)
    return TextConfig(
        vocab=text.get("vocab_size"),
        width=width,
        ffn=text.get("intermediate_size"),
        layers=text.get("num_hidden_layers"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads"),
        head=head,
        rms_eps=text.get("rms_norm_eps", kind=float),
        rope_theta=float(theta),
        mrope_sections=tuple(sections),
        tied=tied,
    )


def _rope(section: _Section) -> Mapping[str, Any]:
    """The rope parameters: `rope_parameters` in transformers 5, `rope_scaling` in 4 and all published checkpoints."""
    rope = section.fields.get("rope_parameters") or section.fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"config.json: {section.path} has rope parameters that are not an object")
    return rope


def _tokens(thinker: _Section) -> TokenIds:
    return TokenIds(
        audio=thinker.get("audio_token_index", "audio_token_id"),
        image=thinker.get("image_token_index", "image_token_id"),
        video=thinker.get("video_token_index", "video_token_id"),
        vision_start=thinker.get("vision_start_token_id"),
        vision_end=thinker.get("vision_end_token_id"),
        audio_start=thinker.get("audio_start_token_id"),
        audio_end=thinker.get("audio_end_token_id"),
    )


def stop_ids(folder: Path, tokenizer: Any, vocab: int) -> tuple[int, ...]:
    """The stop ids from generation_config.json, else the tokenizer's end of turn and end of text.

    Raises:
        InputError: no stop ids are found, or an id is not below `vocab`.
    """
    try:
        stated = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        stated = None
    if isinstance(stated, int):
        stated = [stated]
    if not stated:
        vocabulary = tokenizer.get_added_vocab()
        stated = [vocabulary[token] for token in ("<|im_end|>", "<|endoftext|>") if token in vocabulary]
    if not isinstance(stated, list) or not stated or not all(type(i) is int and 0 <= i < vocab for i in stated):
        raise InputError(f"{folder}: no stop ids of the vocabulary in generation_config.json or the tokenizer")
    return tuple(stated)


def config_json(config: ThinkerConfig) -> dict[str, Any]:
    """Write a config, for example of a model trained from scratch, in the format of published config.json files."""
    audio, vision, text, ids = config.audio, config.vision, config.text, config.tokens
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": audio.width,
            "encoder_layers": audio.layers,
            "encoder_attention_heads": audio.heads,
            "encoder_ffn_dim": audio.ffn,
            "num_mel_bins": audio.mel_bins,
            "n_window": audio.window,
            "output_dim": audio.out,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": vision.layers,
            "hidden_size": vision.width,
            "num_heads": vision.heads,
            "intermediate_size": vision.ffn,
            "in_channels": vision.channels,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "window_size": vision.window,
            "fullatt_block_indexes": list(vision.full_layers),
            "out_hidden_size": vision.out,
        },
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": text.vocab,
            "hidden_size": text.width,
            "intermediate_size": text.ffn,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head,
            "rms_norm_eps": text.rms_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {"rope_type": "default", "mrope_section": list(text.mrope_sections)},
            "tie_word_embeddings": text.tied,
        },
        "audio_token_index": ids.audio,
        "image_token_index": ids.image,
        "video_token_index": ids.video,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "audio_start_token_id": ids.audio_start,
        "audio_end_token_id": ids.audio_end,
        "position_id_per_seconds": config.positions_per_second,
        "seconds_per_chunk": config.seconds_per_chunk,
        "tie_word_embeddings": text.tied,
    }


def declare_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype of the thinker in a config.json, under the field names that it uses."""
    spelled = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    nested = {
        name: declare_dtype(value, dtype)
        for name, value in config.items()
        if name in ("thinker_config", "text_config", "vision_config", "audio_config") and isinstance(value, dict)
    }
    return {**config, **nested, **dict.fromkeys(spelled, dtype)}
