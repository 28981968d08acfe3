"""Raw answers on disk by the hash of all that was asked. Any number of processes may share a folder."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


class Cache:
    """Answers as files FOLDER/ab/abcdef....json: {"model", "answer", "tokens"}. Without a folder it keeps nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, name: str) -> str | None:
        """The answer kept under a name; None if there is no file, or it is not sound."""
        if self.folder is None:
            return None
        try:
            answer = json.loads(self._path(name).read_bytes())["answer"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return answer if isinstance(answer, str) else None

    def put(self, name: str, kept: dict[str, Any]) -> None:
        """Keep an answer. The file has its name only when it is whole, so that others may read at any moment.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(name)
        part = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(kept))
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
