"""Add keypoints, dialogues and probes to the captions of a manifest, for GRPO."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avocado_jax.curation.asking import Asker, Rejected
from avocado_jax.curation.pipeline import Settings, check_length, dialogues_of, keypoints_of, probes_of
from avocado_jax.data import storage
from avocado_jax.data.manifest import parse_manifest
from avocado_jax.errors import InputError
from avocado_jax.eval.metrics import collapses


@dataclass(frozen=True)
class Captioned:
    """A manifest line with a caption.

    Attributes:
        name: the video path in the line.
        folder: the folder of the manifest.
        fields: the other fields: caption, prompt, ...
    """

    id: str
    name: str
    folder: Path
    fields: dict[str, Any]

    def video(self, out: Path) -> str:
        """The video path for a manifest in `out`.

        The path of a file beside the old manifest becomes relative to `out`. Other names do not change: absolute and
        gs:// paths, and names inside the media of `prepare --media`.
        """
        if storage.is_remote(self.name) or os.path.isabs(self.name):
            return self.name
        path = self.folder / self.name
        return os.path.relpath(path.resolve(), out.resolve()) if os.path.exists(path) else self.name

    def missing(self, wanted: Sequence[str]) -> list[str]:
        """The wanted references that the line lacks. An empty list of dialogues is not missing: nobody speaks."""

        def lacks(name: str) -> bool:
            value = self.fields.get(name)
            return value is None if name == "dialogues" else not value

        return [name for name in MAKE if name in wanted and lacks(name)]


def read_captions(path: Path) -> tuple[list[Captioned], list[dict[str, Any]]]:
    """Read a manifest in our own or in ms-swift's format; return its lines and the rejects of the stage "line".

    Raises:
        InputError: the file cannot be read or has no lines.
    """
    entries, bad = parse_manifest(storage.read(str(path)))
    if not entries and not bad:
        raise InputError(f"{path}: has no lines")
    rejects = [
        {
            "id": reject.id,
            "video": reject.video,
            "stage": "line",
            "reason": f"line {reject.line}: {reject.reason}",
            "final": True,
        }
        for reject in bad
    ]
    kept = [
        Captioned(entry.fields["id"], entry.video, path.parent, {k: v for k, v in entry.fields.items() if k != "id"})
        for entry in entries
    ]
    return kept, rejects


MAKE = {"keypoints": keypoints_of, "dialogues": dialogues_of, "probes": probes_of}


async def add_references(asker: Asker, settings: Settings, wanted: Sequence[str], line: Captioned) -> dict[str, Any]:
    """Return the wanted references that a line lacks.

    Raises:
        Rejected: the caption is too short, too long or repeats itself, or no answer is valid.
        Unanswered, Stopped: as `Asker.ask`.
    """
    missing, caption = line.missing(wanted), line.fields["caption"]
    if not missing:
        return {}
    check_length(settings, caption, "the caption")
    if collapses(caption):
        raise Rejected("repetition", "the caption repeats itself over and over")
    return {name: await MAKE[name](asker, line.id, caption) for name in missing}
