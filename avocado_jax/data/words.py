"""A tokenizer that can be pickled: worker processes build it in milliseconds with the `tokenizers` library."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from avocado_jax.data.prompt import load_tokenizer


@dataclass(frozen=True)
class Words:
    """Encodes and decodes texts. Special tokens in a text are encoded as plain text.

    `encode` and `get_added_vocab` are compatible with Hugging Face tokenizers, as `chat_prompt` requires.
    """

    json: str  # tokenizer.json

    def encode(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        if add_special_tokens or not split_special_tokens:
            raise ValueError("only plain text is encoded here")
        return _build_tokenizer(self.json).encode(text, add_special_tokens=False).ids

    def get_added_vocab(self) -> dict[str, int]:
        """Special and other added tokens with their ids."""
        return {
            token.content: number for number, token in _build_tokenizer(self.json).get_added_tokens_decoder().items()
        }

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, including special tokens."""
        return _build_tokenizer(self.json).decode([int(number) for number in ids], skip_special_tokens=False)

    def known_ids(self) -> list[int]:
        """All ids with a token."""
        return sorted(_build_tokenizer(self.json).get_vocab(with_added_tokens=True).values())

    def special_ids(self) -> list[int]:
        """The ids of special tokens."""
        return [
            number for number, token in _build_tokenizer(self.json).get_added_tokens_decoder().items() if token.special
        ]


def load_words(folder: Path) -> Words:
    """Load the tokenizer of a checkpoint's folder.

    Raises:
        InputError: the folder has no tokenizer.
    """
    return Words(load_tokenizer(folder).backend_tokenizer.to_str())


@lru_cache(maxsize=2)
def _build_tokenizer(json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json)
    tokenizer.encode_special_tokens = True
    return tokenizer
