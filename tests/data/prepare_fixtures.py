"""Sources for the tests of prepare in the layout of the published training set."""

import io
import json
import tarfile
from pathlib import Path

from stream_fixtures import READING

from avocado_jax.data.make_shard import Job


def swift(number: int, video: str) -> dict:
    turns = [("system", "Be exact."), ("user", "<video>Describe it."), ("assistant", f"Clip {number}.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns], "videos": [video]}


def pack_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def job(folder: Path, out: Path, **changes) -> Job:
    given = dict(shard_records=2, reading=READING, media=f"{folder}/videos.part-*.tar.gz")
    return Job(str(folder / "set.jsonl"), str(out), **(given | changes))
