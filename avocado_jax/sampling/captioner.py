"""A captioner: parameters, tokenizer, question and sampling of clips."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from avocado_jax.data.media import Media, Reading
from avocado_jax.data.prompt import Habits, Prompt, record_prompt
from avocado_jax.data.rows import Row, make_row
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.sampling.weights import decoding_weights
from avocado_jax.typing import Array, Bool, Int

CONTEXT = 32_768  # maximum prompt tokens in the training of Qwen2.5-Omni


class Captioner(NamedTuple):
    """The inputs of captioning."""

    config: ThinkerConfig
    params: Any  # parameters of `config`, on the default device or sharded over a mesh
    tokenizer: Words
    prompt: Prompt  # the prompt of clips without their own question
    stops: tuple[int, ...]
    banned: Bool[Array, "V"]
    reading: Reading  # how the model's clips are sampled
    question: str
    habits: Habits

    def row(self, media: Media, fields: Mapping[str, Any] = {}) -> Row:
        """Build the row of a clip. `prompt`, `system` and `media_first` default to the captioner's."""
        prompt = record_prompt(self.tokenizer, fields, self.question, self.habits)
        return make_row(media, prompt, self.config, self.reading)


def captioner_of(
    config: ThinkerConfig,
    params: Any,
    tokenizer: Words,
    stops: tuple[int, ...],
    text: str,
    reading: Reading = Reading(),
    habits: Habits = Habits(),
) -> Captioner:
    """Build a captioner from parameters in the layout of `config`.

    Raises:
        InputError: the tokenizer has ids outside the vocabulary.
    """
    prompt = record_prompt(tokenizer, {}, text, habits)
    if (largest := max([*prompt.before, *prompt.after])) >= config.text.vocab:
        raise InputError(f"the tokenizer makes id {largest}, the vocabulary ends at {config.text.vocab}")
    banned = banned_ids(config, tokenizer, stops)
    return Captioner(config, params, tokenizer, prompt, stops, banned, reading, text, habits)


def captioner_in_training(
    config: ThinkerConfig,
    params: Any,
    tokenizer: Words,
    stops: tuple[int, ...],
    text: str,
    dtype: str,
    reading: Reading = Reading(),
    habits: Habits = Habits(),
) -> Captioner:
    """Build a captioner from the parameters of a training state: a copy in `dtype` with separate layers.

    All processes must call this, and then `caption_records` with the same records.
    """
    weights = decoding_weights(params, dtype, _mesh(params))
    return captioner_of(computed(config, dtype, scan=False), weights, tokenizer, stops, text, reading, habits)


def _mesh(params: Any) -> Mesh | None:
    """The mesh of the parameters; None for parameters on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def banned_ids(config: ThinkerConfig, tokenizer: Words, stops: tuple[int, ...]) -> Bool[Array, "V"]:
    """Mask of ids excluded from captions: media placeholders, special tokens except the stops, and unused ids."""
    banned = np.ones(config.text.vocab, bool)
    banned[[i for i in tokenizer.known_ids() if i < config.text.vocab]] = False
    ids = config.tokens
    media = [ids.audio, ids.image, ids.video, ids.vision_start, ids.vision_end, ids.audio_start, ids.audio_end]
    banned[[i for i in (*tokenizer.special_ids(), *media) if i < config.text.vocab]] = True
    banned[list(stops)] = False
    return banned


def clip_warnings(media: Media, row: Row, reading: Reading) -> list[str]:
    """Warnings about lost or unused parts of a clip, and about prompts longer than those of training."""
    warnings, frames, tokens = list(media.warnings), len(media.frames), len(row.prompt_ids)
    if frames >= reading.most_frames and media.seconds * reading.fps > frames + reading.fps:
        skipped = 1 - frames / (media.seconds * reading.fps)
        warnings.append(f"only {frames} frames of its {media.seconds:.0f} s are used, {skipped:.0%} fewer than usual")
    if tokens > CONTEXT:
        warnings.append(f"its prompt has {tokens} tokens, the model was trained with at most {CONTEXT}")
    return warnings


def words(captioner: Captioner, tokens: Int[Array, "C"]) -> str:
    """The text of one caption's tokens, without its stop id."""
    return captioner.tokenizer.decode([int(token) for token in tokens if token not in captioner.stops]).strip()
