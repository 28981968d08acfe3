"""The server over real sockets with the official client: requests, answers, streams, refusals."""

import base64
import json
import os
import re
import socket
import sys
from fractions import Fraction
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import stub_server
from running_server import KEY, clip_part, data_url, running

from avocado_jax.__main__ import main
from avocado_jax.data.decode import read_media
from avocado_jax.serving.app import grown
from avocado_jax.serving.protocol import Answer
from avocado_jax.world.check import measure


def test_clip_by_each_kind_of_url(server, root):
    """A data URL, a file URL and a link within the root give the clip that the reader gives."""
    path = root / "sub" / "a clip.mp4"
    expected = stub_server.digest(read_media(path, stub_server.READING))
    urls = [data_url(path.read_bytes()), path.as_uri(), f"file://localhost{path}".replace(" ", "%20")]
    for url in (*urls, (root / "within.mp4").as_uri()):
        found = server.described("What?", clip_part(url))
        assert found["clip"] == expected
        assert found["turns"] == [["system", "You are a stub.", None], ["user", "What?", ""]]
    assert server.described(clip_part(urls[0]))["turns"][1] == ["user", "", "What happens?"]


def test_clip_as_images_and_sound(server):
    """Frames as JPEG and PNG and a sound, as `curate` sends them; texts keep their order around the media."""
    import av
    import numpy as np

    from avocado_jax.curation.content import jpeg, wav

    frame = np.full((64, 96, 3), (200, 40, 40), np.uint8)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = 64, 96, "rgb24", Fraction(1, 25)
    png = b"".join(map(bytes, codec.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))))
    samples = np.sin(np.arange(16000) / 9).astype(np.float32) / 2
    images = [
        {"type": "image_url", "image_url": {"url": data_url(one, "image/x"), "detail": "low"}}
        for one in (jpeg(frame), png, jpeg(frame))
    ]
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(samples, 16000)).decode()}}
    sound["input_audio"]["format"] = "wav"
    found = server.described("first", images[0], "then", *images[1:], sound, "last")
    assert found["turns"][1] == ["user", "first", "then\nlast"]
    assert found["clip"]["shape"] == [4, 56, 84, 3]  # an odd number of frames: the last one twice
    assert found["clip"]["seconds"] == 2.0
    assert found["clip"]["samples"]
    alone = server.described(sound)["clip"]
    assert alone["samples"] == found["clip"]["samples"]
    assert alone["shape"][0] == 2
    with pytest.raises(openai.BadRequestError, match="not a JPEG or PNG"):
        server.chat({"type": "image_url", "image_url": {"url": data_url(b"GIF89a")}})


def test_conversations_with_several_turns(server):
    messages = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "text", "text": "How?"}]},
    ]
    made = server.client.chat.completions.create(model="stub", messages=messages, max_tokens=5, max_completion_tokens=3)
    found = json.loads(made.choices[0].message.content)
    assert found["turns"] == [["user", "Who?", None], ["assistant", "Nobody.", None], ["user", "Why?\nHow?", None]]
    assert found["limit"] == 3
    assert found["clip"] is None
    assert made.choices[0].finish_reason == "length"
    assert made.usage.total_tokens == 16
    assert server.client.models.list().data[0].id == server.client.models.retrieve("stub").id == "stub"


def test_streamed_answers(server):
    parts = list(server.chat("slow", stream=True, stream_options={"include_usage": True}))
    texts = [part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content]
    assert "".join(texts) == " ".join(stub_server.WORDS)
    assert len(texts) > 10
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "stop"
    assert parts[-1].usage.completion_tokens == 50
    with pytest.raises(openai.APIError, match="too late"):
        list(server.chat("late", stream=True))


def test_warnings_about_a_clip(server):
    """Warnings are a field of the answer and of each chunk of a stream."""
    assert server.chat("warned").model_extra["warnings"] == ["dark"]
    assert next(server.chat("warned", stream=True)).model_extra["warnings"] == ["dark"]
    assert not server.chat("a").model_extra.get("warnings")


def test_stream_withholds_incomplete_characters():
    """The bytes of a character may come in two tokens; spaces at the end are cut from complete answers."""
    assert grown(Answer("caf\ufffd", 1), "") == "caf"
    assert grown(Answer("café \ufffd", 1), "caf") == "é"
    assert grown(Answer("café o", 1, complete=True), "café") == " o"
    assert grown(Answer("ca", 1), "caf") == ""


def test_api_keys_are_checked(server):
    for key in ("wrong", KEY + "x", KEY[:-1]):
        client = openai.OpenAI(**{**server.options, "api_key": key})
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert json.load(urlopen(f"{server.url}/health")) == {"status": "ok"}


BAD = {
    "model": ({"model": "other"}, 404, "no model 'other'"),
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a part of another type": ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "file"),
    "two clips": (
        {"messages": [{"role": "user", "content": [clip_part("data:;base64,"), clip_part("data:;base64,")]}]},
        400,
        "one clip a request",
    ),
    "a clip of the assistant": (
        {
            "messages": [
                {"role": "assistant", "content": [clip_part("data:;base64,")]},
                {"role": "user", "content": "a"},
            ]
        },
        400,
        "one user message",
    ),
    "the assistant last": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "last message"),
    "n": ({"n": 2}, 400, "n is not supported"),
    "stop": ({"stop": ["a"]}, 400, "stop is not supported"),
    "format": ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not supported"),
    "temperature": ({"temperature": 3}, 400, "temperature"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "a text for a number": ({"max_tokens": "9"}, 400, "max_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_requests_are_refused(server, name):
    change, status, message = BAD[name]
    body = {"model": "stub", "messages": [{"role": "user", "content": "a"}], **change}
    with pytest.raises(openai.APIStatusError, match=re.escape(message)) as raised:
        server.client.post("/chat/completions", body=body, cast_to=object)
    assert raised.value.status_code == status
    assert raised.value.body["type"]


def raw_request(server, head: str, body: bytes = b"") -> tuple[int, dict]:
    """Status and body of the response to a raw request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_invalid_bodies_are_refused(server):
    post = "POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json"
    many = b"[" + b"1," * 2**18 + b"1]"
    for body, message in (
        (b"{", "Invalid JSON"),
        (many, "too many"),
        (b"[" * 10**5, "recursion"),
        (b"\xff\xfe", "JSON"),
        (b"3", "object"),
    ):
        status, answer = raw_request(server, f"{post}\r\nContent-Length: {len(body)}", b"\r\n" + body)
        assert status == 400
        assert message in answer["error"]["message"]
    assert raw_request(server, "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 0", b"\r\n")[0] == 415
    assert raw_request(server, "GET /v1/nothing HTTP/1.1", b"\r\n")[0] == 404
    assert raw_request(server, "GET /v1/chat/completions HTTP/1.1", b"\r\n")[0] == 405
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    status, answer = raw_request(server, f"{post}\r\nTransfer-Encoding: chunked", b"\r\n" + chunk * 2 + b"0\r\n\r\n")
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_too_large_body_is_refused(server):
    with pytest.raises(openai.APIStatusError) as raised:
        server.chat("a" * 3 * 2**20)
    assert raised.value.status_code == 413


def test_curate_uses_this_server(tmp_path, monkeypatch, capsys):
    """Frames, sound and texts of `curate` arrive unchanged: the answers equal the truth of the clip."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "curation")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "curation"), *sys.path]))
    from fake_curator import SMALL, make_clips, unique_keypoints

    truths = make_clips(tmp_path / "clips", [(0, 0), (1, 0)])
    (tmp_path / "truths.json").write_text(json.dumps([{**one, "path": str(one["path"])} for one in truths]))
    with running("--truths", tmp_path / "truths.json", "--bytes", 2**24) as server:
        out = tmp_path / "out"
        command = ["curate", *(str(one["path"]) for one in truths), "--out", str(out), "--url", f"{server.url}/v1"]
        assert main([*command, "--model", "stub", *SMALL, "--json"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line, truth in zip(lines, truths):
        assert measure(line["caption"], truth).recall == 1.0
        assert line["keypoints"] == unique_keypoints(truth)
