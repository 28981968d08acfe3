"""Keypoints, dialogues and probes for captions that exist: lines of a manifest become rows for GRPO."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avocado_jax.curation.asking import Asker, Rejected
from avocado_jax.curation.pipeline import Settings, dialogues_of, keypoints_of, probes_of, within
from avocado_jax.data import storage
from avocado_jax.data.manifest import parse_manifest
from avocado_jax.errors import InputError
from avocado_jax.eval.metrics import collapses


@dataclass(frozen=True)
class Captioned:
    """A line of a manifest.

    Attributes:
        name: the video, as the line names it.
        folder: of the manifest.
        fields: the others: caption, prompt, ...
    """

    id: str
    name: str
    folder: Path
    fields: dict[str, Any]

    def video(self, out: Path) -> str:
        """The video as a manifest in `out` names it.

        A file beside the old manifest is named as seen from `out`. Other names stay as they are: absolute and gs://
        paths, and names inside the media of `prepare --media`.
        """
        if storage.is_remote(self.name) or os.path.isabs(self.name):
            return self.name
        path = self.folder / self.name
        return os.path.relpath(path.resolve(), out.resolve()) if os.path.exists(path) else self.name

    def missing(self, wanted: Sequence[str]) -> list[str]:
        """The wanted references that the line lacks. An empty list of dialogues is one: nobody speaks."""

        def lacks(name: str) -> bool:
            value = self.fields.get(name)
            return value is None if name == "dialogues" else not value

        return [name for name in MAKE if name in wanted and lacks(name)]


def read_captions(path: Path) -> tuple[list[Captioned], list[dict[str, Any]]]:
    """The lines of a manifest, in its own or in ms-swift's format, and rejects of the stage "line".

    Raises:
        InputError: it cannot be read, or has no lines.
    """
    entries, bad = parse_manifest(storage.read(str(path)))
    if not entries and not bad:
        raise InputError(f"{path}: has no lines")
    rejects = [
        {"id": one.id, "video": one.video, "stage": "line", "reason": f"line {one.line}: {one.reason}", "final": True}
        for one in bad
    ]
    kept = [
        Captioned(entry.fields["id"], entry.video, path.parent, {k: v for k, v in entry.fields.items() if k != "id"})
        for entry in entries
    ]
    return kept, rejects


MAKE = {"keypoints": keypoints_of, "dialogues": dialogues_of, "probes": probes_of}


async def add_references(asker: Asker, settings: Settings, wanted: Sequence[str], line: Captioned) -> dict[str, Any]:
    """Make the references of MAKE that are wanted and that a line lacks.

    Raises:
        Rejected: the caption is too short, too long or repeats itself, or no answer can be used.
        Unanswered, Stopped: as `Asker.ask`.
    """
    missing, caption = line.missing(wanted), line.fields["caption"]
    if not missing:
        return {}
    within(settings, caption, "the caption")
    if collapses(caption):
        raise Rejected("repetition", "the caption repeats itself over and over")
    return {name: await MAKE[name](asker, line.id, caption) for name in missing}
