"""Settings for sampling a clip, and the result: the selected frames, and the sound at 16 kHz."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from avocado_jax.data.prompt import Habits
from avocado_jax.errors import InputError
from avocado_jax.typing import Array, Float, Shaped


@dataclass(frozen=True)
class Reading:
    """How a clip is sampled. The defaults are AVoCaDO's (2 fps, 20,070,400 pixels per clip)."""

    fps: float = 2.0
    fewest_frames: int = 4
    most_frames: int = 768
    fewest_pixels: int = 128 * 28 * 28  # minimum pixels per frame
    most_pixels: int = 768 * 28 * 28  # maximum pixels per frame, before `asked_pixels`
    asked_pixels: int = 401_408  # maximum pixels per frame in the request
    clip_pixels: int = 20_070_400  # maximum pixels of all frames
    size_factor: int = 28  # height and width of a frame are multiples of this
    sound_rate: int = 16_000  # samples per second
    sound_seconds: int = 300  # maximum seconds of sound
    # Align sound to its timestamps. If false, gaps are closed and late sound starts at 0, as in the reference.
    align_sound: bool = field(default=False, repr=False)
    # Clip length that the model captions best. Longer clips are split into segments of about this length.
    segment_seconds: int = field(default=60, repr=False, compare=False)


def reading_fields(reading: Reading) -> dict[str, Any]:
    """The fields of a reading for manifests and digests.

    A false `align_sound` is omitted, so that folders from before this field stay valid. `segment_seconds` does not
    influence how a clip is read.
    """
    values = {name: value for name, value in asdict(reading).items() if name != "segment_seconds"}
    return {name: value for name, value in values.items() if name != "align_sound" or value}


def load_reading(folder: Path) -> Reading:
    """Load a checkpoint's reading from `reading.json` in its folder. Defaults to AVoCaDO's.

    Raises:
        InputError: the file has an unknown property, or a value that is not a positive number.
    """
    path = folder / "reading.json"
    if not path.is_file():
        return Reading()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    kinds = {field.name: field.type for field in fields(Reading)}
    if not isinstance(values, dict):
        raise InputError(f"{path}: not an object")
    values = {name: value for name, value in values.items() if name not in Habits._fields}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{path}: no property '{name}' of a reading")
        if name == "align_sound":
            if type(value) is not bool:
                raise InputError(f"{path}: align_sound is {value!r}, not true or false")
        elif type(value) not in (int, kinds[name]) or not value > 0:
            raise InputError(f"{path}: {name} is {value!r}, not a positive {kinds[name].__name__}")
    return Reading(**values)


def parse_reading(given: Sequence[str], habits: bool = False) -> dict[str, Any]:
    """Parse NAME=VALUE arguments with properties of a reading.

    Args:
        habits: also accept the prompt settings of a checkpoint (prompt.py).

    Raises:
        InputError: a property is unknown, or its value is not a positive number, or not "true" or "false" for
            `media_first`.
    """
    kinds = {field.name: field.type for field in fields(Reading) if field.name != "align_sound"}  # has its own option
    changed: dict[str, Any] = {}
    for part in given:
        name, _, value = part.partition("=")
        if habits and name in Habits._fields:
            if name == "media_first" and value not in ("true", "false"):
                raise InputError(f"--reading {part}: '{value}' is not true or false")
            changed[name] = value == "true" if name == "media_first" else value
            continue
        if name not in kinds:
            near = get_close_matches(name, kinds, 1)
            raise InputError(f"--reading {part}: no '{name}'" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            changed[name] = kinds[name](value)
        except ValueError:
            changed[name] = 0
        if not changed[name] > 0:
            raise InputError(f"--reading {part}: '{value}' is not a positive {kinds[name].__name__}")
    return changed


class Media(NamedTuple):
    """A clip in memory."""

    frames: Shaped[Array, "N h w 3"]  # uint8, resized
    samples: Float[Array, "n"] | None  # mono; None without sound
    seconds: float  # duration of video and sound
    times: Float[Array, "N"] | None = None  # presentation time of each frame in seconds; None if unknown
    warnings: tuple[str, ...] = ()  # lost or displaced content
