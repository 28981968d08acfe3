"""Run the pipeline on all clips concurrently, and write the manifest and the rejects."""

import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from avocado_jax.curation.asking import Asker, Rejected, Stopped, Unanswered
from avocado_jax.curation.captions import Captioned
from avocado_jax.curation.pipeline import Captions, Settings, Source, curate_clip
from avocado_jax.data import storage
from avocado_jax.data.reader import ClipReader, available_cores
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")  # of the videos searched for in a folder


@dataclass(frozen=True)
class Clip:
    """A video to curate."""

    id: str
    path: Path
    fields: ClassVar[dict[str, Any]] = {}  # of its manifest line, known before curation

    def video(self, out: Path) -> str:
        """The video path for a manifest in `out`."""
        return os.path.relpath(self.path.resolve(), out.resolve())


Item = TypeVar("Item", Clip, Captioned)


@dataclass
class Curated:
    """The results of a run.

    Attributes:
        lines: new manifest fields, by clip.
        rejects: {"stage", "reason", "final"} by clip; a clip that is not final is tried again in another run.
    """

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejects: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stages(self) -> dict[str, int]:
        """The number of final rejects, by stage."""
        return dict(Counter(reject["stage"] for reject in self.rejects.values() if reject["final"]))

    def unanswered(self) -> int:
        """The number of clips without an answer of the endpoint."""
        return sum(not reject["final"] for reject in self.rejects.values())


def find_clips(given: Sequence[Path]) -> list[Clip]:
    """List the videos given as files or in folders. A clip's id is its file stem if unique, else its path.

    Raises:
        InputError: a path does not exist, a folder contains no video, or a video is given twice.
    """
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise InputError(f"{path}: no videos in it ({' '.join(SUFFIXES)})")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise InputError(f"{path}: no such file")
    stems, resolved = Counter(path.stem for path in paths), set()
    for path in paths:
        try:
            str(path.resolve()).encode()
        except UnicodeEncodeError:
            raise InputError(f"{str(path)!a}: its name is not UTF-8, and a manifest must be") from None
        if path.resolve() in resolved:
            raise InputError(f"{path}: given twice")
        resolved.add(path.resolve())
    return [Clip(path.stem if stems[path.stem] == 1 else path.as_posix(), path) for path in paths]


def curate_clips(
    asker: Asker, clips: Sequence[Clip], settings: Settings, local: Captions | None, at_once: int
) -> Curated:
    """Curate clips, `at_once` at a time. Ends and raises as `curate`."""
    with ClipReader(min(at_once, available_cores())) as reader:

        async def work(clip: Clip) -> dict[str, Any]:
            return await curate_clip(asker, Source(clip.id, clip.path, settings.reading, reader), settings, local)

        return curate(asker, clips, work, at_once)


def curate(
    asker: Asker, items: Sequence[Item], work: Callable[[Item], Awaitable[dict[str, Any]]], at_once: int
) -> Curated:
    """Run `work` on all items, `at_once` at a time, until all are done or `asker.why` is set.

    Args:
        work: returns fields of the item's manifest line; raises Rejected, Unanswered or Stopped.

    Raises:
        InputError: the endpoint refuses the first request (key, model or address).
    """
    done = Curated()

    async def process(item: Item) -> None:
        try:
            done.lines[item.id] = await work(item)
        except (Rejected, Unanswered) as error:
            final = isinstance(error, Rejected)
            done.rejects[item.id] = {"stage": error.stage, "reason": str(error), "final": final}
        except Stopped:
            pass

    def works() -> Iterator[Any]:
        for item in items:
            if asker.why:
                return
            yield process(item)

    for _ in progress(asker.client.run_all(works(), at_once), "curate: clips", len(items)):
        pass
    asker.note_spent()
    return done


def write_outcome(
    out: Path, items: Sequence[Clip | Captioned], done: Curated, bad_lines: Sequence[dict[str, Any]] = ()
) -> None:
    """Write manifest.jsonl and rejects.jsonl in the order of the items; video paths are relative to the folder.

    Args:
        bad_lines: additional rejects.
    """
    lines, rejects = [], list(bad_lines)
    for item in items:
        named = {"id": item.id, "video": item.video(out)}
        if item.id in done.lines:
            lines.append(named | item.fields | done.lines[item.id])
        elif item.id in done.rejects:
            rejects.append(named | done.rejects[item.id])
    for name, entries in (("manifest.jsonl", lines), ("rejects.jsonl", rejects)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in entries)
        storage.write(str(out / name), text.encode(errors="backslashreplace"))
