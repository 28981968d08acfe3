"""The chat prompt: what is asked about a clip, as token ids around the place where its media go."""

from pathlib import Path
from typing import Any, NamedTuple

from avocado_jax.errors import InputError

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory "
    "and visual inputs, as well as generating text and speech."
)

# Training draws among them, `caption` asks the first.
PROMPTS = (
    "Describe this video in full, from beginning to end: what is seen and what is heard, each at its moment.",
    "Write a detailed account of the clip that keeps picture and sound together as they happen in time.",
    "Tell everything that can be seen and heard here, in order, and how the sounds belong to the pictures.",
    "Give a complete description of the video: scenes, actions, camera, speech in quotation marks with its "
    "speaker, music and noises, in the order of their appearance.",
    "What happens in this clip? Follow it moment by moment, and weave what is heard into what is seen.",
    "Describe the visual and the audible content of this video together, in step with each other, leaving "
    "nothing important out.",
    "Please caption this video thoroughly, saying who does and says what, what it looks like and what it "
    "sounds like as it goes on.",
)


class Prompt(NamedTuple):
    """Token ids before and after the media."""

    before: list[int]
    after: list[int]


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own fast tokenizer, from its files alone.

    Raises:
        InputError: the folder has none.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, and not needed by those who have ids

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library's compiled half raises nothing narrower
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


def chat_prompt(tokenizer: Any, text: str, system: str = SYSTEM) -> Prompt:
    """Qwen's chat format with the media first in the user's turn.

    Special tokens that are spelled out in `text` or `system` stay text.
    """
    start, end = (special_id(tokenizer, token) for token in ("<|im_start|>", "<|im_end|>"))

    def words(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    line = words("\n")
    before = [start, *words(f"system\n{system}"), end, *line, start, *words("user\n")]
    return Prompt(before, [*words(text), end, *line, start, *words("assistant\n")])


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        raise InputError(f"the tokenizer has no token {token}")
    return found
