"""A checkpoint, its tokenizer and a prompt, ready to caption clips."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import Checkpoint, load_params
from avocado_jax.data.prompt import Prompt, chat_prompt, load_tokenizer
from avocado_jax.data.rows import Row, fit, rounded, shape_of, stack
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.sampling.generate import Samples, caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Bool, Int


class Captioner(NamedTuple):
    """Everything that captioning needs, on the default device."""

    config: ThinkerConfig
    params: Any  # layers apart
    tokenizer: Any
    prompt: Prompt
    stops: tuple[int, ...]
    banned: Bool[Array, "V"]


def load_captioner(checkpoint: Checkpoint, text: str, dtype: str) -> Captioner:
    """Load an opened checkpoint, computing in `dtype`, with `text` as the question.

    Raises:
        InputError: it has no tokenizer, no stop ids, or a tokenizer of another vocabulary.
    """
    folder = checkpoint.side_files
    tokenizer = load_tokenizer(folder)
    prompt = chat_prompt(tokenizer, text)
    config = computed(checkpoint.config, dtype, scan=False)
    if (largest := max([*prompt.before, *prompt.after])) >= config.text.vocab:
        raise InputError(f"{folder}: the tokenizer makes id {largest}, the vocabulary ends at {config.text.vocab}")
    stops = stop_ids(folder, tokenizer, config.text.vocab)
    banned = jnp.asarray(banned_ids(config, tokenizer, stops))
    return Captioner(config, load_params(checkpoint, dtype), tokenizer, prompt, stops, banned)


def banned_ids(config: ThinkerConfig, tokenizer: Any, stops: tuple[int, ...]) -> Bool[Array, "V"]:
    """Ids that a caption can never hold: media placeholders, special tokens, rows that are no token; not the stops."""
    banned = np.ones(config.text.vocab, bool)
    known = np.fromiter(tokenizer.get_vocab().values(), int)
    banned[known[known < config.text.vocab]] = False
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    ids = config.tokens
    media = [ids.audio, ids.image, ids.video, ids.vision_start, ids.vision_end, ids.audio_start, ids.audio_end]
    banned[[i for i in (*special, *media) if i < config.text.vocab]] = True
    banned[list(stops)] = False
    return banned


def caption_rows(
    captioner: Captioner,
    rows: list[Row],
    numbers: Int[Array, "B"],
    sampling: Sampling,
    length: int,
    seed: int = 0,
    group: int = 1,
) -> Samples:
    """Sample `group` captions of each row, all rows in one batch, padded to a shape that few batches differ in.

    `numbers` identify the clips: with `seed` they decide what is drawn, whatever else is in the batch.
    """
    clip = jax.tree.map(jnp.asarray, stack([row.clip for row in rows], rounded(fit([shape_of(r.clip) for r in rows]))))
    samples = generate(
        captioner.params,
        clip,
        caption_keys(seed, numbers, group),
        captioner.banned,
        config=captioner.config,
        sampling=sampling,
        stops=captioner.stops,
        length=length,
    )
    return jax.tree.map(np.asarray, samples)


def words(captioner: Captioner, tokens: Int[Array, "C"]) -> str:
    """The text of one caption's tokens, without its stop id."""
    kept = [int(token) for token in tokens if token not in captioner.stops]
    return captioner.tokenizer.decode(kept, skip_special_tokens=False).strip()
