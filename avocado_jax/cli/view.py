"""Write an HTML page of a run: its curves, and its captions beside their clips and references.

  avocado view runs/grpo_world                             # runs/grpo_world/report.html
  avocado view runs/grpo_7b --data clips.jsonl --out /tmp  # videos and references from a manifest
  avocado view gs://bucket/run --out run.html --last 3

The page needs no server and loads nothing from elsewhere. It shows every scalar of metrics.jsonl, the captions of the
newest rollouts with their rewards, advantages and lengths (sorted and filtered by any of them), and those that `sft`
writes of held-out clips; keypoints that a caption states and lines of dialogue that agree are marked in it, as
`score --judge lexical` finds them.

References and clips are looked up by id in the manifests given by --data, else in the data that the run's config
names. Videos of a manifest are linked at their location; clips from shards, and AVWorld clips as the model receives
them, are written beside the page.
"""

import argparse
import hashlib
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from avocado_jax.config import DataConfig
from avocado_jax.data import storage
from avocado_jax.data.manifest import parse_manifest
from avocado_jax.data.records import Record
from avocado_jax.errors import InputError
from avocado_jax.eval.report import Clip, page, report
from avocado_jax.parallel.compiled import use_user_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="RUN", help="folder of a run of `sft` or `grpo`, local or gs://")
    parser.add_argument("--out", metavar="FILE_OR_DIR", help="default: report.html in RUN")
    parser.add_argument("--data", action="append", metavar="FILE", help="a manifest; may be repeated")
    parser.add_argument("--last", type=int, default=10, metavar="N", help="rollouts of N steps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    if args.last < 1:
        raise InputError(f"--last is {args.last}, must be at least 1")
    jax.config.update("jax_platforms", "cpu")  # a run may be using the accelerator
    use_user_cache()  # the marks of keypoints use the programs of the lexical judge
    target = args.out or storage.join(args.folder, "report.html")
    if Path(target).is_dir() or not target.endswith(".html"):
        target = storage.join(target, "report.html")
    clips = _Manifests(args.data, target) if args.data else _Sources(args.folder, target)
    data = report(args.folder, args.last, clips)
    for note in clips.notes:
        print(f"avocado view: {note}", file=sys.stderr)
    data["notes"] += clips.notes
    storage.write(target, page(data).encode())
    print(target)
    return 0


class _Manifests:
    """Clips from the lines of manifests, with videos at their location."""

    def __init__(self, files: list[str], target: str) -> None:
        self._clips: dict[str, tuple[dict[str, Any], str]] = {}
        self._target, self._missing, self._lacking = target, 0, 0
        for file in files:
            entries, rejects = parse_manifest(storage.read(file))
            if not entries:
                raise InputError(f"{file}: " + (f"line {rejects[0].line}: {rejects[0].reason}" if rejects else "empty"))
            folder = file.rpartition("/")[0]
            self._clips |= {entry.fields["id"]: (entry.fields, storage.join(folder, entry.video)) for entry in entries}

    @property
    def notes(self) -> list[str]:
        """Messages about missing clips and videos."""
        counts = {"clips are in no manifest": self._missing, "videos are not where the manifest says": self._lacking}
        return [f"{count} {message}" for message, count in counts.items() if count]

    def __call__(self, kind: str, name: str) -> Clip | None:
        if name not in self._clips:
            self._missing += 1
            return None
        fields, video = self._clips[name]
        if storage.is_remote(video) or storage.is_remote(self._target) or not Path(video).is_file():
            self._lacking += 1
            return Clip(fields, None)
        folder = Path(self._target).resolve().parent
        return Clip(fields, _address(os.path.relpath(Path(video).resolve(), folder)))


class _Sources:
    """Clips from the data of a run's config. Their files are written to a folder next to the page."""

    def __init__(self, run: str, target: str) -> None:
        self.notes: list[str] = []  # messages about clips that could not be read
        self._folder, self._sources = target.removesuffix(".html") + "_clips", {}
        where = storage.join(run, "config.json")
        self._config = json.loads(storage.read(where))["data"] if storage.exists(where) else None

    def __call__(self, kind: str, name: str) -> Clip | None:
        try:
            if kind not in self._sources:
                self._sources[kind] = self._open(kind)
            if self._sources[kind] is None:
                return None
            where, source, numbers = self._sources[kind]
            record = source[numbers[name]]
            return Clip(record.fields, self._written(where, record))
        except (InputError, OSError, KeyError) as error:
            note = f"references: {error}"
            self.notes += [note] * (note not in self.notes)
            self._sources.setdefault(kind, None)
            return None

    def _open(self, kind: str) -> tuple[str, Any, dict[str, int]] | None:
        from avocado_jax.train.inputs import open_source  # slow to import

        if self._config is None:
            raise InputError("the run has no config.json; --data names a manifest")
        where = self._config["heldout" if kind == "samples" else "train"]
        source, _ = open_source(where, DataConfig(**self._config))
        return where, source, {name: number for number, name in enumerate(source.index.ids)}

    def _written(self, where: str, record: Record) -> str:
        """The URL of a clip's file, which is written if it is missing."""
        encoded = isinstance(record.clip, bytes)
        suffix = Path(record.name).suffix[1:9] if encoded else "mp4"
        key = hashlib.sha256(f"{where} {record.fields['id']}".encode(errors="surrogatepass")).hexdigest()[:20]
        name = f"{key}.{suffix if suffix.isalnum() else 'mp4'}"
        path = storage.join(self._folder, name)
        if not storage.exists(path):
            storage.write(path, record.clip if encoded else _encoded(record.clip))
        return _address(f"{self._folder.rpartition('/')[2]}/{name}")


def _encoded(media: Any) -> bytes:
    """Encode the frames and sound that the model receives as an mp4 file."""
    import tempfile

    from avocado_jax.world.clip import write_mp4

    height, width = media.frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        rate = Fraction(len(media.frames) / media.seconds).limit_denominator(1000)
        write_mp4(path, iter(media.frames), (height, width), rate, media.samples)
        return path.read_bytes()


def _address(path: str) -> str:
    """Convert a path relative to the page to an unambiguous relative URL."""
    return "./" + quote(path)
