"""Caption files: one JSON line per clip, appended in input order. Resumable after a kill at any time."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from avocado_jax.data import storage
from avocado_jax.data.appended import open_lines
from avocado_jax.errors import InputError


class CaptionFiles:
    """The output of one process. A context manager that flushes on exit.

    Args:
        out: a file for captions and errors; or a folder (an existing one, or a name that ends with "/") or gs://
            prefix for captions-I-of-N.jsonl and rejects-I-of-N.jsonl.
        shard: I and N.
        options: the settings that determine the captions. Stored next to the output; a resumed run must have the same.
        retry_failed: remove the lines of failed clips, so that they are captioned again.
        dry_run: only read existing files.

    Raises:
        InputError: the output cannot be written, has other options, or is in use.
        StorageError: storage failed.
    """

    def __init__(
        self, out: str, shard: tuple[int, int], options: Mapping[str, Any], retry_failed: bool, dry_run: bool = False
    ) -> None:
        folder = out.endswith("/") or os.path.isdir(out) or (storage.is_remote(out) and not out.endswith(".jsonl"))
        part = f"{shard[0]}-of-{shard[1]}"
        if folder:
            names = [storage.join(out, f"{kind}-{part}.jsonl") for kind in ("captions", "rejects")]
            self._beside = storage.join(out, f"options-{part}.json")
        elif shard[1] > 1:
            raise InputError(f"--shard: --out {out} must be a folder (a name that ends with /) or a gs:// prefix")
        else:
            names, self._beside = [out], f"{out}.options.json"
        self.options = self._kept_options(dict(options), dry_run)
        self._stack, self._done, files = ExitStack(), Counter[str](), []
        for name in () if dry_run else names:
            file, data = open_lines(name, self._stack, lambda data, name=name: _clips(data, name, retry_failed)[1])
            files.append(file)
            self._done.update(_clips(data, name, False)[0])
        for name in names if dry_run else ():
            self._done.update(_clips(storage.read(name) if storage.exists(name) else b"", name, retry_failed)[0])
        self._captions, self._rejects = (files[0], files[-1]) if files else (None, None)
        self.finished = self._done.total()

    def _kept_options(self, options: dict[str, Any], dry_run: bool) -> dict[str, Any]:
        if not storage.exists(self._beside):
            if not dry_run:
                storage.write(self._beside, json.dumps(options, indent=1).encode())
            return options
        kept = json.loads(storage.read(self._beside))
        if options["batch"] is None:  # the number of slots may change near ties in bf16
            options["batch"] = kept.get("batch")
        if differ := sorted(name for name, value in options.items() if kept.get(name) != value):
            was = ", ".join(f"{name} {json.dumps(kept.get(name))} (now {json.dumps(options[name])})" for name in differ)
            raise InputError(f"--out was begun with {was}: use the same options, or another --out ({self._beside})")
        return kept

    def keep(self, name: str, value: Any) -> Any:
        """Store an option that is determined at run time. Returns the value of the first start."""
        if name not in self.options:
            self.options[name] = value
            storage.write(self._beside, json.dumps(self.options, indent=1).encode())
        return self.options[name]

    def take(self, clip: str) -> bool:
        """Whether the output already has this occurrence of a clip. Each line counts for one occurrence."""
        if not self._done[clip]:
            return False
        self._done[clip] -= 1
        return True

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the line of a clip."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        (self._rejects if "error" in record else self._captions).append(line)

    def flush(self) -> None:
        """Append the buffered lines. Thread-safe."""
        for file in filter(None, (self._captions, self._rejects)):
            file.flush()

    def __enter__(self) -> "CaptionFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _clips(data: bytes, name: str, retry_failed: bool) -> tuple[Counter[str], bytes]:
    """Count the clips of a file's lines; also return the lines, without errors if `retry_failed`."""
    clips, kept = Counter[str](), []
    for line in data.splitlines(keepends=True):
        try:
            found = json.loads(line.decode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise InputError(f"{name}: has a line that is not JSON ({error})") from error
        if not isinstance(found, dict) or not isinstance(found.get("clip"), str):
            raise InputError(f"{name}: has a line that is not of a clip; choose another --out")
        if not (retry_failed and "error" in found):
            clips[found["clip"]] += 1
            kept.append(line)
    return clips, b"".join(kept)
