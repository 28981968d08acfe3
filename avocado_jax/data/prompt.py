"""Chat prompts: the question about a clip as token ids before and after the media tokens."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avocado_jax.data import storage
from avocado_jax.errors import InputError

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory "
    "and visual inputs, as well as generating text and speech."
)

# Training draws from these; `caption` uses the first.
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


class Habits(NamedTuple):
    """The prompt settings of a checkpoint, used if a manifest line has none. The defaults are AVoCaDO's."""

    prompt: str = ""  # empty: one of `PROMPTS`
    system: str = SYSTEM  # empty: no system message
    media_first: bool = True  # the media precede the question


def load_habits(folder: Path) -> Habits:
    """Load the prompt settings from `reading.json` in a checkpoint's folder.

    Raises:
        InputError: a value has the wrong type.
    """
    path = folder / "reading.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    stated = {name: value for name, value in stated.items() if name in Habits._fields}
    for name, value in stated.items():
        if type(value) is not type(Habits._field_defaults[name]):
            raise InputError(f"{path}: {name} is {value!r}, not a {type(Habits._field_defaults[name]).__name__}")
    return Habits(**stated)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Read the prompts of a file, local or gs://, one per line. Empty lines are skipped.

    Raises:
        InputError: the file does not exist, or contains no prompt.
        StorageError: storage failed.
    """
    try:
        lines = storage.read(str(path)).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {error}") from error
    if not (prompts := tuple(line.strip() for line in lines if line.strip())):
        raise InputError(f"{path}: no prompt in it")
    return prompts


def choose_prompt(prompts: Sequence[str], name: str) -> str:
    """Choose the prompt of a clip from a hash of its name, independent of its position in a list."""
    return prompts[zlib.crc32(os.fsencode(name)) % len(prompts)]


class Prompt(NamedTuple):
    """Token ids before and after the media."""

    before: list[int]
    after: list[int]


class Turn(NamedTuple):
    """A message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: the text; in the turn with the media, the text before the media.
        after: the text after the media; None in turns without media.
    """

    role: str
    text: str
    after: str | None = None


def load_tokenizer(folder: Path) -> Any:
    """Load the fast tokenizer of a checkpoint's folder, without network access.

    Raises:
        InputError: the folder has no tokenizer.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the compiled library raises no narrower type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


def record_prompt(tokenizer: Any, fields: Mapping[str, Any], question: str, habits: Habits = Habits()) -> Prompt:
    """The prompt of a clip from its manifest fields, with `question` and `habits` as defaults."""
    return chat_prompt(
        tokenizer,
        fields.get("prompt") or question,
        fields.get("system", habits.system),
        fields.get("media_first", habits.media_first),
    )


def chat_prompt(tokenizer: Any, text: str, system: str = SYSTEM, media_first: bool = True) -> Prompt:
    """A question about a clip: a system turn unless `system` is empty, and a user turn with media and question."""
    user = Turn("user", "", text) if media_first else Turn("user", text, "")
    return conversation_prompt(tokenizer, [Turn("system", system), user] if system else [user])


def conversation_prompt(tokenizer: Any, turns: Sequence[Turn]) -> Prompt:
    """Encode turns in Qwen's chat format, followed by the start of the answer.

    Special tokens in a text are encoded as plain text. Without a turn with media, all ids are in `before`.
    """
    start, end = (special_id(tokenizer, token) for token in ("<|im_start|>", "<|im_end|>"))

    def words(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    line, ids = words("\n"), Prompt([], [])
    into = ids.before
    for turn in turns:
        into += [start, *words(f"{turn.role}\n{turn.text}")]
        if turn.after is not None:
            into = ids.after
            into += words(turn.after)
        into += [end, *line]
    into += [start, *words("assistant\n")]
    return ids


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    found = tokenizer.get_added_vocab().get(token)
    if found is None:
        raise InputError(f"the tokenizer has no token {token}")
    return found
