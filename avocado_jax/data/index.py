"""The index of a prepared data set: location and sizes of each record, the input of the batch plan.

The file is an uncompressed .npz with an array per column. Ids are stored as one array of UTF-8 bytes and an array of
lengths.
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
FORMAT = 2  # version of prepared folders
KINDS = {"seconds": np.float64, "content": np.uint64}  # dtypes of columns other than int32
BYTES_PER_TOKEN = 3  # estimate for captions without token counts; few texts have less


class Index(NamedTuple):
    """Columns with one entry per record."""

    ids: list[str]
    seconds: Array  # float, duration of the clip
    shard: Array  # index of the shard
    position: Array  # position in the shard
    frames: Array  # number of frames read
    height: Array  # pixels
    width: Array  # pixels
    mel: Array  # log-mel frames; 0 for a clip without sound
    caption: Array  # length of the longest caption
    prompt: Array  # length of the record's question and system message; 0 if it has none
    unit: str  # unit of `caption` and `prompt`: "token" or "byte" (`byte_length`)


class Sizes(NamedTuple):
    """The sizes of the records' rows."""

    shape: Shape  # sizes of the clip, each an array [N]
    caption: Int[Array, "N"]  # caption tokens including the stop


def byte_length(text: str) -> int:
    """UTF-8 bytes, with BYTES_PER_TOKEN for each digit or mark, because most tokenizers encode these separately."""
    marks = sum(character.isascii() and not (character.isalpha() or character.isspace()) for character in text)
    return len(text.encode()) + (BYTES_PER_TOKEN - 1) * marks


def measured(record: Record, media: Media, words: Words | None = None) -> dict[str, Any]:
    """The columns of one record without its location. Text lengths are in tokens of `words`, or by `byte_length`."""

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
    """Serialize an index. Equal records give equal bytes.

    Args:
        ids: id of each record.
        columns: `seconds`, `COLUMNS`, and further columns for `prepare`; each has the length of `ids`.
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
    """Load the ids and all columns of an index file.

    Raises:
        InputError: the file is damaged, or not an index.
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
    """Load an index.

    Raises:
        InputError: the data are not a valid index.
    """
    ids, columns = load_columns(data, where)
    try:
        return Index(ids=ids, unit=unit, **{name: columns[name] for name in ("seconds", *COLUMNS)})
    except KeyError as error:
        raise InputError(f"{where}: not an index (no column {error})") from error


def sizes(index: Index, prompt: int, longest: int, config: ThinkerConfig) -> Sizes:
    """Compute the sizes of every record's row.

    Args:
        prompt: tokens of the run's longest prompt without the media.
        longest: maximum caption tokens including the stop; longer captions are truncated.
    """
    vision, audio = config.vision, config.audio
    patches = -(-index.frames // vision.temporal_patch)
    rows, columns = (size // vision.patch // vision.merge for size in (index.height, index.width))
    windows = -(-rows // vision.window_cells) * -(-columns // vision.window_cells)
    counts = np.arange(index.mel.max(initial=0) + 1)
    sound = np.array([audio_tokens(int(count)) for count in counts])[index.mel]
    chunks = np.where(sound > 0, -(-index.mel // (2 * audio.window)), 0)
    # A record's question has at most one token per byte; the surrounding tokens are counted in `prompt`.
    question = prompt + index.prompt
    tokens = patches * rows * columns + sound + np.where(sound > 0, 4, 2) + question - 1
    caption = index.caption if index.unit == "token" else -(-index.caption // BYTES_PER_TOKEN)
    return Sizes(Shape(tokens, patches, windows, chunks), np.minimum(caption + 1, longest))
