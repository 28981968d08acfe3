import hashlib
import io
import json

import pytest

from avocado_jax.data import manifest
from avocado_jax.data.manifest import Reject, hash_name, parse_manifest, scan_manifest

GOOD = {"id": "a", "video": "a.mp4", "caption": "A dog barks."}


def parse_lines_of(*lines):
    return parse_manifest(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))


def test_valid_lines_keep_every_field():
    full = GOOD | {"references": ["x"], "events": [{"text": "t"}], "extra": 3, "caption": "a 猫 <|im_end|>"}
    entries, rejects = parse_lines_of(full)
    assert not rejects
    assert entries[0].video == "a.mp4"
    assert entries[0].fields == {key: value for key, value in full.items() if key != "video"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'"messages"', "not a JSON object"),
        ({"video": "a.mp4", "caption": "c"}, "has no 'id'"),
        ({"id": "a", "caption": "c"}, "has no 'video'"),
        ({"id": "a", "video": "a.mp4"}, "has no 'caption'"),
        (GOOD | {"caption": ""}, "'caption' is not a text, or empty"),
        (GOOD | {"caption": None}, "'caption' is not a text"),
        (GOOD | {"id": 7}, "'id' is not a text"),
        (GOOD | {"prompt": 7}, "'prompt' is not a text"),
        (GOOD | {"references": "x"}, "'references' is not a list of texts"),
        (GOOD | {"events": ["x"]}, "'events' is not a list of objects"),
        (b'{"id": "a", "video": "v", "caption": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
        ({"messages": [], "videos": ["a"]}, "one question and one answer"),
        ({"messages": "x", "videos": ["a"]}, "'messages' is not a list"),
        ({"messages": [], "videos": []}, "'videos' is not a list of one path"),
        ({"messages": [], "videos": ["a"], "audios": ["b"]}, "separate sound"),
        ({"messages": [{"role": "user", "content": [1]}], "videos": ["a"]}, "'messages' is not a list"),
    ],
)
def test_bad_lines_are_rejected_with_number_and_reason(line, reason):
    entries, rejects = parse_lines_of({**GOOD, "id": "first"}, line)
    assert [entry.fields["id"] for entry in entries] == ["first"]
    assert rejects[0].line == 2
    assert reason in rejects[0].reason
    assert "\n" not in rejects[0].reason


def test_first_of_equal_ids_is_kept():
    entries, rejects = parse_lines_of(GOOD, b"", GOOD | {"video": "b.mp4"})
    assert [entry.video for entry in entries] == ["a.mp4"]
    assert rejects == [Reject(3, "a", "b.mp4", "its id is that of line 1")]


def test_swift_lines_mix_with_own_lines():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>What is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    entries, rejects = parse_lines_of(
        GOOD,
        {"messages": messages, "videos": ["b.mp4"]},
        {"messages": messages[1:], "videos": ["b.mp4"], "id": "named"},
    )
    assert not rejects
    assert entries[1].fields == {"id": "b.mp4#2", "caption": "A cat.", "prompt": "What is it?", "system": "Be brief."}
    assert entries[2].fields == {"id": "named", "caption": "A cat.", "prompt": "What is it?"}
    assert entries[1].video == "b.mp4"


@pytest.mark.parametrize(
    ("question", "system", "fields"),
    [
        ("What is it?<video>", None, {"prompt": "What is it?", "media_first": False}),
        ("What is it? <video><audio>\n", "", {"prompt": "What is it?", "media_first": False, "system": ""}),
        ("<video>\n<audio> What?", None, {"prompt": "What?"}),
        ("<video>", None, {}),
        ("What?", None, {"prompt": "What?"}),
        ("What <video> is it?", None, "middle of the question"),
        ("<video>What<audio>", None, "middle of the question"),
    ],
)
def test_swift_lines_set_the_media_order(question, system, fields):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat."}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    entries, rejects = parse_lines_of({"messages": turns, "videos": ["b.mp4"], "id": "b"})
    if isinstance(fields, str):
        assert fields in rejects[0].reason
    else:
        assert entries[0].fields == {"id": "b", "caption": "A cat.", **fields}


def test_media_first_is_a_boolean():
    entries, rejects = parse_lines_of(GOOD | {"media_first": False, "system": ""}, GOOD | {"id": "b", "media_first": 1})
    assert entries[0].fields["media_first"] is False
    assert "media_first" in rejects[0].reason


def test_scan_equals_parsing(monkeypatch):
    monkeypatch.setattr(manifest, "LONGEST_LINE", 150)
    lines = [
        GOOD,
        b"",
        b"{",
        GOOD | {"id": "b"},
        GOOD | {"video": "c.mp4"},
        GOOD | {"id": "long", "caption": "x" * 400},
    ]
    text = b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in [*lines, GOOD | {"id": "é"}]
    )
    cuts = [10, 60, len(text)]
    found = scan_manifest(io.BytesIO(text), lambda video: video[:1], None, cuts)
    assert found.number.tolist() == [1, 4, 7]
    assert [json.loads(found.text(io.BytesIO(text), row))["id"] for row in range(3)] == ["a", "b", "é"]
    assert found.video.tolist() == [hash_name("a")] * 3
    assert [(reject.line, reject.reason.partition(" (")[0]) for reject in found.rejects] == [
        (3, "not JSON"), (5, "its id is that of line 1"), (6, "is too long for a line")
    ]  # fmt: skip
    assert found.prefix_md5 == {size: hashlib.md5(text[:size]).hexdigest() for size in cuts}
    part = scan_manifest(io.BytesIO(text), str, 60, [10])
    assert (part.size, part.prefix_md5[60], part.number.tolist()) == (60, found.prefix_md5[60], [1])
