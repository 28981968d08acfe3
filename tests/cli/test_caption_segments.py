"""`caption --segments`: a long clip is several requests of the engine and one line of output. The model is a stub."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from clips import GOOD, write

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.load import SHIPPED
from avocado_jax.cli import caption as command
from avocado_jax.data import storage
from avocado_jax.data.media import Reading, load_reading, reading_fields
from avocado_jax.sampling import segments as module
from avocado_jax.sampling.engine import Engine


def scene_frame(index, width, height):
    """A frame whose colour changes every 2 s."""
    return np.full((height, width, 3), (40 * (index // 20), 90, 250 - 40 * (index // 20)), np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of 10 s with five scenes, a short one and a broken one."""
    folder = tmp_path_factory.mktemp("clips")
    write(folder / "a.mp4", 100, 64, 48, sound=np.zeros((1, 441_000), np.float32), draw=scene_frame)
    GOOD["plain.mp4"](folder / "b.mp4")
    (folder / "c.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def stub(monkeypatch):
    """A stub whose captions state clip and frames of the request, in reverse order. Clips in `failing` fail."""
    requests, failing = [], set()

    class Stub(Engine):
        def run(self, given):
            found = list(given)
            requests.extend(request for request, *_ in found)
            for request, row, number in reversed(found):
                if isinstance(row, Exception) or number in failing:
                    yield request, row if isinstance(row, Exception) else MemoryError("too large")
                    continue
                ids = self.captioner.tokenizer.encode(f"{number} {len(row.clip.patches)}")
                yield request, np.array([*ids, self.captioner.stops[0]], np.int32)

    monkeypatch.setattr(command, "Engine", Stub)
    Stub.requests, Stub.failing = requests, failing
    return Stub


def run(capsys, *arguments, status=0):
    """Run the command. Returns the lines of the output and stderr."""
    assert main(["caption", *map(str, arguments), "--json"]) == status
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_long_clips_are_segmented(clips, stub, capsys):
    """One request per segment, with its part of the clip and its samples; one line per clip, in input order."""
    (long, short, broken), _ = run(capsys, clips, "--segments", 2, status=1)
    assert [segment["start"] for segment in long["segments"]] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [segment["end"] for segment in long["segments"]] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert long["caption"] == "\n\n".join(segment["caption"] for segment in long["segments"])
    assert len({segment["caption"].split()[0] for segment in long["segments"]}) == 5
    assert {segment["caption"].split()[1] for segment in long["segments"]} == {"2"}  # 4 frames in 2 s
    assert (long["seconds"], long["audio"], long["truncated"]) == (10.0, True, False)
    assert len(long["prompt_ids"]) == sum(
        len(request.prompt_ids) for request in stub.requests if request.clip.name.endswith("a.mp4")
    )
    assert short["segments"] == [{"start": 0.0, "end": 2.0, "caption": short["caption"]}]
    assert "not a video" in broken["error"]
    (whole, same, _), _ = run(capsys, clips, status=1)
    assert "segments" not in whole
    assert whole["caption"].split()[1] == "10"
    assert same["caption"] == short["caption"]


def test_failed_segment_fails_its_clip(clips, stub, capsys):
    stub.failing.add(module.digest(f"{clips / 'a.mp4'}#2") >> 1)
    (long, short, _), _ = run(capsys, clips, "--segments", 2, status=1)
    assert long == {"clip": str(clips / "a.mp4"), "error": f"{clips / 'a.mp4'}: too large"}
    assert "caption" in short


def test_clip_in_a_bucket_is_downloaded_once(clips, stub, capsys, monkeypatch, tmp_path):
    """The copy is kept until the last segment is read."""
    copies, real = [], storage.local_copy

    @contextmanager
    def local_copy(path):
        if path != str(clips / "a.mp4"):
            with real(path) as found:
                yield found
            return
        copies.append(tmp_path / f"{len(copies)}.mp4")
        shutil.copy(path, copies[-1])
        yield copies[-1]
        copies[-1].unlink()

    monkeypatch.setattr(storage, "local_copy", local_copy)
    (made,), _ = run(capsys, clips / "a.mp4", "--segments", 1)
    assert len(made["segments"]) >= 8
    assert len(copies) == 1
    assert not copies[0].exists()


def test_warnings_name_the_segment(clips, stub, capsys, monkeypatch):
    monkeypatch.setattr(module, "clip_warnings", lambda media, row, reading: ["dark"])
    _, errors = run(capsys, clips / "a.mp4", "--segments", 4)
    assert f"{clips / 'a.mp4'}: warning: from 0 to 4 s: dark" in errors
    _, errors = run(capsys, clips / "a.mp4")
    assert f"{clips / 'a.mp4'}: warning: dark" in errors


def test_segment_lengths():
    assert command._segment_lengths(None, Reading()) is None
    assert command._segment_lengths("auto", Reading()) == (60, 100.0)
    assert command._segment_lengths("auto", load_reading(SHIPPED)) == (6, 100.0)
    assert command._segment_lengths("12", Reading()) == (12.0, pytest.approx(20.0))
    assert "segment_seconds" not in reading_fields(Reading(segment_seconds=5))
    assert Reading(segment_seconds=5) == Reading()


@pytest.mark.parametrize("given", ["many", "0", "-1", "nan", "inf", ""])
def test_invalid_segment_lengths_are_refused(clips, capsys, given):
    assert main(["caption", str(clips), "--segments", given]) == 2
    assert "--segments" in capsys.readouterr().err


def test_resuming_with_other_segments_is_refused(clips, stub, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    assert main(["caption", str(clips / "b.mp4"), "--segments", "auto", "--out", out]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["segments"]
    assert main(["caption", str(clips / "b.mp4"), "--out", out]) == 2
    assert 'segments "auto" (now null)' in capsys.readouterr().err
