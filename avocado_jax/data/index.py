"""The index of a prepared data set: where each record lies and how large it is, from which batches are planned."""

import json
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
    unit: str  # of the two lengths: "token" or "byte" (of UTF-8)


class Sizes(NamedTuple):
    """What a record asks of a bucket."""

    shape: Shape  # of the clip; each size an array of N
    caption: Int[Array, "N"]  # caption tokens with the stop


def measured(record: Record, media: Media, words: Words | None = None) -> dict[str, Any]:
    """The index line of one record, but for its place; texts are counted in tokens of `words`, or in bytes."""

    def length(text: str) -> int:
        return len(words.encode(text) if words else text.encode())

    frames, height, width = media.frames.shape[:3]
    texts = [record.fields["caption"], *record.fields.get("references", [])]
    asked = [record.fields.get(name, "") for name in ("prompt", "system")]
    return {
        "id": record.fields["id"],
        "seconds": round(media.seconds, 3),
        "frames": frames,
        "height": height,
        "width": width,
        "mel": 0 if media.samples is None else -(-len(media.samples) // 160),
        "caption": max(map(length, texts)),
        "prompt": sum(map(length, asked)),
    }


def load_index(text: bytes, unit: str, where: str) -> Index:
    """The index from its JSONL file.

    Raises:
        InputError: it cannot be read as one.
    """
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        columns = {name: np.array([line[name] for line in lines], np.int32) for name in COLUMNS}
        seconds = np.array([line["seconds"] for line in lines], np.float64)
        return Index(ids=[line["id"] for line in lines], seconds=seconds, unit=unit, **columns)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not an index ({error})") from error


def sizes(index: Index, prompt: int, longest: int, config: ThinkerConfig) -> Sizes:
    """The sizes of every record's row.

    Args:
        prompt: tokens of the longest question that the run asks, all but the media.
        longest: caption tokens, with the stop, past which captions are cut.
    """
    vision, audio = config.vision, config.audio
    patches = -(-index.frames // vision.temporal_patch)
    rows, columns = (side // vision.patch // vision.merge for side in (index.height, index.width))
    windows = -(-rows // vision.window_cells) * -(-columns // vision.window_cells)
    counts = np.arange(index.mel.max(initial=0) + 1)
    heard = np.array([audio_tokens(int(count)) for count in counts])[index.mel]
    chunks = np.where(heard > 0, -(-index.mel // (2 * audio.window)), 0)
    # A question of its own has at most one token a byte; what stands around it is in the run's own prompt.
    asked = prompt + index.prompt
    tokens = patches * rows * columns + heard + np.where(heard > 0, 4, 2) + asked - 1
    caption = index.caption if index.unit == "token" else -(-index.caption // BYTES_PER_TOKEN)
    return Sizes(Shape(tokens, patches, windows, chunks), np.minimum(caption + 1, longest))
