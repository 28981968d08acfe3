"""All clips through the pipeline, many at once, and what becomes of them: a manifest to prepare, and the rejects."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avocado_jax.curation.asking import Asker, Rejected, Stopped, Unanswered
from avocado_jax.curation.pipeline import Captions, Settings, Source, curate_clip
from avocado_jax.data import storage
from avocado_jax.data.reader import ClipReader
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")  # of videos in a folder


@dataclass(frozen=True)
class Clip:
    """A video to curate."""

    id: str
    path: Path


@dataclass
class Curated:
    """What became of the clips.

    Attributes:
        lines: of the manifest, by clip.
        rejects: {"stage", "reason", "final"} by clip; what is not final may do better in another run.
    """

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejects: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stages(self) -> dict[str, int]:
        """How many clips were rejected for good at each stage."""
        return dict(Counter(one["stage"] for one in self.rejects.values() if one["final"]))

    def unanswered(self) -> int:
        """How many clips the endpoint did not answer for."""
        return sum(not one["final"] for one in self.rejects.values())


def clips_of(given: Sequence[Path]) -> list[Clip]:
    """The videos that are named, and those in the folders that are named. An id is the file's name, where it is alone.

    Raises:
        InputError: one does not exist, a folder holds no video, or a video is given twice.
    """
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
            if not found:
                raise InputError(f"{path}: no videos in it ({' '.join(SUFFIXES)})")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise InputError(f"{path}: no such file")
    stems, seen = Counter(path.stem for path in paths), set()
    for path in paths:
        try:
            str(path.resolve()).encode()
        except UnicodeEncodeError:
            raise InputError(f"{str(path)!a}: its name is not UTF-8, and a manifest must be") from None
        if path.resolve() in seen:
            raise InputError(f"{path}: given twice")
        seen.add(path.resolve())
    return [Clip(path.stem if stems[path.stem] == 1 else path.as_posix(), path) for path in paths]


def curate(asker: Asker, clips: Sequence[Clip], settings: Settings, local: Captions | None, at_once: int) -> Curated:
    """Take clips through all stages, `at_once` at a time, until all are done or `asker.why` says why not.

    Raises:
        InputError: the endpoint has never answered, and refuses for a reason that is the caller's.
    """
    done, reader = Curated(), ClipReader(min(at_once, len(os.sched_getaffinity(0))))

    async def one(clip: Clip) -> None:
        try:
            done.lines[clip.id] = await curate_clip(
                asker, Source(clip.id, clip.path, settings.reading, reader), settings, local
            )
        except (Rejected, Unanswered) as error:
            final = isinstance(error, Rejected)
            done.rejects[clip.id] = {"stage": error.stage, "reason": str(error), "final": final}
        except Stopped:
            pass

    def works() -> Iterator[Any]:
        for clip in clips:
            if asker.why:
                return
            yield one(clip)

    with reader:
        for _ in progress(asker.client.each(works(), at_once), "curate: clips", len(clips)):
            pass
    asker.note_spent()
    return done


def write_outcome(out: Path, clips: Sequence[Clip], done: Curated) -> None:
    """Write manifest.jsonl and rejects.jsonl, in the order of the clips; videos as seen from the folder."""
    lines, rejects = [], []
    for clip in clips:
        video = relative(clip.path, out)
        if clip.id in done.lines:
            lines.append({"id": clip.id, "video": video} | done.lines[clip.id])
        elif clip.id in done.rejects:
            rejects.append({"id": clip.id, "video": video} | done.rejects[clip.id])
    for name, held in (("manifest.jsonl", lines), ("rejects.jsonl", rejects)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in held)
        storage.write(str(out / name), text.encode(errors="backslashreplace"))


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, whose links are followed."""
    return os.path.relpath(path.resolve(), folder.resolve())
