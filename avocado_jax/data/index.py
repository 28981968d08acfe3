"""The index of a prepared data set: where each record lies and how large it is, from which batches are planned.

It is stored as an uncompressed .npz file with an array for each column. The ids are one array of UTF-8 bytes and the
length of each.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from avocado_jax.data.features import audio_tokens
from avocado_jax.data.media import Media
from avocado_jax.data.records import Record
from avocado_jax.data.rows import Shape
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Int

COLUMNS = ("shard", "position", "frames", "height", "width", "mel", "caption", "prompt")
FORMAT = 2  # of a prepared folder: 2 has the index in columns
KINDS = {"seconds": np.float64, "content": np.uint64}  # of columns that are not int32
BYTES_PER_TOKEN = 3  # of captions that no tokenizer has counted: few texts have less


class Index(NamedTuple):
    """One entry a record."""

    ids: list[str]
    seconds: Array  # float, length of each clip
    shard: Array  # which shard, and where in it
    position: Array
    frames: Array  # frames that are read of it, and their size in pixels
    height: Array
    width: Array
    mel: Array  # log-mel frames, 0 for a clip without sound
    caption: Array  # length of its longest caption
    prompt: Array  # length of its own question and system text, 0 where it has none
    unit: str  # of the two lengths: "token" or "byte" (`byte_length`)


class Sizes(NamedTuple):
    """What a record asks of a bucket."""

    shape: Shape  # of the clip; each size an array of N
    caption: Int[Array, "N"]  # caption tokens with the stop


def byte_length(text: str) -> int:
    """Bytes of UTF-8, of which a digit or a mark has BYTES_PER_TOKEN: most tokenizers make a token of each."""
    marks = sum(character.isascii() and not (character.isalpha() or character.isspace()) for character in text)
    return len(text.encode()) + (BYTES_PER_TOKEN - 1) * marks


def measured(record: Record, media: Media, words: Words | None = None) -> dict[str, Any]:
    """The columns of one record except its place. Texts are counted in tokens of `words`, or by `byte_length`."""

    def length(text: str) -> int:
        return len(words.encode(text)) if words else byte_length(text)

    frames, height, width = media.frames.shape[:3]
    texts = [record.fields["caption"], *record.fields.get("references", [])]
    prompts = [record.fields.get(name, "") for name in ("prompt", "system")]
    return {
        "id": record.fields["id"],
        "seconds": round(media.seconds, 3),
        "frames": frames,
        "height": height,
        "width": width,
        "mel": 0 if media.samples is None else -(-len(media.samples) // 160),
        "caption": max(map(length, texts)),
        "prompt": sum(map(length, prompts)),
    }


def dump_index(ids: list[str], columns: Mapping[str, Any]) -> bytes:
    """The index file of records. Equal records give equal bytes.

    Args:
        ids: id of each record.
        columns: `seconds` and `COLUMNS`, and others that only `prepare` reads; each of the length of `ids`.
    """
    texts = [name.encode() for name in ids]
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=False,
        id_bytes=np.frombuffer(b"".join(texts), np.uint8),
        id_lengths=np.array([len(text) for text in texts], np.int32),
        **{name: np.asarray(column, KINDS.get(name, np.int32)) for name, column in columns.items()},
    )
    return file.getvalue()


def load_columns(data: bytes, where: str) -> tuple[list[str], dict[str, Array]]:
    """The ids and all columns of an index file.

    Raises:
        InputError: it is damaged, or not an index.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        text, lengths = columns.pop("id_bytes").tobytes(), columns.pop("id_lengths")
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        ids = [text[first:last].decode() for first, last in zip([0, *ends], ends)]
        if any(len(column) != len(ids) for column in columns.values()) or len(text) != sum(lengths.tolist()):
            raise ValueError("columns of several lengths")
        return ids, columns
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{where}: not an index ({error})") from error


def load_index(data: bytes, unit: str, where: str) -> Index:
    """The index from its file.

    Raises:
        InputError: it cannot be read as one.
    """
    ids, columns = load_columns(data, where)
    try:
        return Index(ids=ids, unit=unit, **{name: columns[name] for name in ("seconds", *COLUMNS)})
    except KeyError as error:
        raise InputError(f"{where}: not an index (no column {error})") from error


def sizes(index: Index, prompt: int, longest: int, config: ThinkerConfig) -> Sizes:
    """The sizes of every record's row.

    Args:
        prompt: tokens of the longest question that the run asks, all but the media.
        longest: caption tokens, with the stop, past which captions are cut.
    """
    vision, audio = config.vision, config.audio
    patches = -(-index.frames // vision.temporal_patch)
    rows, columns = (size // vision.patch // vision.merge for size in (index.height, index.width))
    windows = -(-rows // vision.window_cells) * -(-columns // vision.window_cells)
    counts = np.arange(index.mel.max(initial=0) + 1)
    sound = np.array([audio_tokens(int(count)) for count in counts])[index.mel]
    chunks = np.where(sound > 0, -(-index.mel // (2 * audio.window)), 0)
    # A question of its own has at most one token a byte; what stands around it is in the run's own prompt.
    question = prompt + index.prompt
    tokens = patches * rows * columns + sound + np.where(sound > 0, 4, 2) + question - 1
    caption = index.caption if index.unit == "token" else -(-index.caption // BYTES_PER_TOKEN)
    return Sizes(Shape(tokens, patches, windows, chunks), np.minimum(caption + 1, longest))
