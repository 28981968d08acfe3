"""The server over real sockets with the official client: what it accepts and refuses, its limits, its end."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import stub_server
from clips import GOOD

from avocado_jax.__main__ import main
from avocado_jax.data.decode import read_media
from avocado_jax.serving.app import grown
from avocado_jax.serving.download import is_public
from avocado_jax.serving.protocol import Answer, ApiError
from avocado_jax.serving.sources import Sources
from avocado_jax.world.check import measure

KEY = "a key"


class Running:
    """A server in a process of its own."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, stub_server.__file__, *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        given = KEY if "--key" in options else "none"
        self.options = dict(base_url=f"{self.url}/v1", api_key=given, max_retries=0, timeout=30.0)
        self.client = openai.OpenAI(**self.options)

    def chat(self, *parts, **options):
        """The text of an answer."""
        content = [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="stub", messages=messages, **options)

    def described(self, *parts, **options):
        """What the stub received."""
        return json.loads(self.chat(*parts, **options).choices[0].message.content)

    def metric(self, name: str) -> int:
        """A value on the page of metrics, 0 if it is not there."""
        found = re.search(rf"^avocado_{re.escape(name)} (\d+)$", urlopen(f"{self.url}/metrics").read().decode(), re.M)
        return int(found[1]) if found else 0

    def wait_for(self, name: str, value: int) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 10
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


@contextmanager
def running(*options: object):
    server = Running(*options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A media root with a clip, links and files that are no clips; a clip beside it."""
    folder = tmp_path_factory.mktemp("served")
    inside, outside = folder / "root", folder / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    GOOD["plain.mp4"](inside / "sub" / "a clip.mp4")
    (outside / "clip.mp4").write_bytes((inside / "sub" / "a clip.mp4").read_bytes())
    (inside / "link.mp4").symlink_to(outside / "clip.mp4")
    (inside / "folder").symlink_to(outside)
    (inside / "within.mp4").symlink_to("sub/a clip.mp4")
    (inside / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(inside / "pipe.mp4")
    (folder / "root-twin").mkdir()
    (folder / "root-twin" / "clip.mp4").write_bytes((outside / "clip.mp4").read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{outside}/clip.mp4\n#EXT-X-ENDLIST\n"
    (inside / "list.m3u8").write_text(playlist)
    (inside / "list.mp4").write_text(playlist)
    (inside / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {outside}/clip.mp4\n")
    (inside / "empty.mp4").write_bytes(b"")
    (inside / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (inside / "cut.mp4").write_bytes((outside / "clip.mp4").read_bytes()[:5000])
    return inside


@pytest.fixture(scope="module")
def server(root):
    with running("--root", root, "--key", KEY, "--requests", 8) as made:
        yield made


def clip_part(url):
    return {"type": "video_url", "video_url": {"url": url}}


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_a_clip_in_each_way(server, root):
    """A data URL, a file URL and a link within the root give the clip that the reader gives."""
    path = root / "sub" / "a clip.mp4"
    expected = stub_server.digest(read_media(path, stub_server.READING))
    urls = [data_url(path.read_bytes()), path.as_uri(), f"file://localhost{path}".replace(" ", "%20")]
    for url in (*urls, (root / "within.mp4").as_uri()):
        found = server.described("What?", clip_part(url))
        assert found["clip"] == expected
        assert found["turns"] == [["system", "You are a stub.", None], ["user", "What?", ""]]
    assert server.described(clip_part(urls[0]))["turns"][1] == ["user", "", "What happens?"]


def test_a_clip_in_parts(server):
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


def test_conversations(server):
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


def test_streams(server):
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
    """They are a field of the answer, and of each part of a stream."""
    assert server.chat("warned").model_extra["warnings"] == ["dark"]
    assert next(server.chat("warned", stream=True)).model_extra["warnings"] == ["dark"]
    assert not server.chat("a").model_extra.get("warnings")


def test_a_stream_holds_back_what_is_not_complete():
    """The bytes of a character may come in two tokens; spaces at the end are cut from complete answers."""
    assert grown(Answer("caf\ufffd", 1), "") == "caf"
    assert grown(Answer("café \ufffd", 1), "caf") == "é"
    assert grown(Answer("café o", 1, complete=True), "café") == " o"
    assert grown(Answer("ca", 1), "caf") == ""


def test_keys(server):
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
def test_bad_requests(server, name):
    change, status, message = BAD[name]
    body = {"model": "stub", "messages": [{"role": "user", "content": "a"}], **change}
    with pytest.raises(openai.APIStatusError, match=re.escape(message)) as raised:
        server.client.post("/chat/completions", body=body, cast_to=object)
    assert raised.value.status_code == status
    assert raised.value.body["type"]


def raw(server, head: str, body: bytes = b"") -> tuple[int, dict]:
    """Status and body of an answer to a request as bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_bodies_that_are_no_requests(server):
    post = "POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json"
    many = b"[" + b"1," * 2**18 + b"1]"
    for body, message in (
        (b"{", "Invalid JSON"),
        (many, "too many"),
        (b"[" * 10**5, "recursion"),
        (b"\xff\xfe", "JSON"),
        (b"3", "object"),
    ):
        status, answer = raw(server, f"{post}\r\nContent-Length: {len(body)}", b"\r\n" + body)
        assert status == 400
        assert message in answer["error"]["message"]
    assert raw(server, "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 0", b"\r\n")[0] == 415
    assert raw(server, "GET /v1/nothing HTTP/1.1", b"\r\n")[0] == 404
    assert raw(server, "GET /v1/chat/completions HTTP/1.1", b"\r\n")[0] == 405
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    status, answer = raw(server, f"{post}\r\nTransfer-Encoding: chunked", b"\r\n" + chunk * 2 + b"0\r\n\r\n")
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_too_large_a_body(server):
    with pytest.raises(openai.APIStatusError) as raised:
        server.chat("a" * 3 * 2**20)
    assert raised.value.status_code == 413


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "concat.mp4", "empty.mp4", "noise.mp4", "cut.mp4"])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_clips_and_playlists(server, root, name, stream):
    for url in ((root / name).as_uri(), data_url((root / name).read_bytes())):
        with pytest.raises(openai.BadRequestError, match="the clip: ") as raised:
            server.chat(clip_part(url), stream=stream)
        assert "/proc/" not in str(raised.value)
    assert server.metric("requests_in_flight") == 0


REFUSED = {
    "a clip outside": lambda root: (root.parent / "outside/clip.mp4").as_uri(),
    "a folder with the same beginning": lambda root: (root.parent / "root-twin/clip.mp4").as_uri(),
    "a link": lambda root: (root / "link.mp4").as_uri(),
    "a linked folder": lambda root: (root / "folder/clip.mp4").as_uri(),
    "dots to the outside": lambda root: f"file://{root}/sub/../../outside/clip.mp4",
    "dots to the inside": lambda root: f"file://{root}/sub/../within.mp4",
    "escaped dots": lambda root: f"file://{root}/sub/%2e%2e/%2e%2e/outside/clip.mp4",
    "passwords": lambda root: "file:///etc/passwd",
    "a missing file": lambda root: f"file://{root}/missing.mp4",
    "a pipe": lambda root: f"file://{root}/pipe.mp4",
    "a folder": lambda root: f"file://{root}/sub",
    "a loop of links": lambda root: f"file://{root}/loop.mp4",
    "a descriptor": lambda root: "file:///proc/self/fd/0",
    "NUL": lambda root: f"file://{root}/within.mp4%00",
    "another host": lambda root: f"file://example.com{root}/within.mp4",
    "a relative path": lambda root: "file:within.mp4",
    "a query": lambda root: f"file://{root}/within.mp4?a",
    "a path": lambda root: f"{root}/within.mp4",
    "another scheme": lambda root: "ftp://127.0.0.1/clip.mp4",
    "a scheme of FFmpeg": lambda root: f"concat:{root}/within.mp4",
    "no base64": lambda root: "data:video/mp4;base64,####",
    "a plain data URL": lambda root: "data:video/mp4,abc",
    "nothing": lambda root: "",
    "a bad host": lambda root: "file://[/a",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_urls(server, root, name):
    with pytest.raises(openai.APIStatusError) as raised:
        server.chat(clip_part(REFUSED[name](root)))
    assert raised.value.status_code in (400, 403)


def test_a_file_that_is_replaced_between_check_and_use(root, tmp_path, monkeypatch):
    """What counts is the file that was opened, not what its name referred to before."""
    link, real = root / "changing.mp4", os.open
    link.symlink_to("within.mp4")

    def replaced(path, *options):
        link.unlink()
        link.symlink_to(root.parent / "outside" / "clip.mp4")
        return real(path, *options)

    monkeypatch.setattr(os, "open", replaced)
    with pytest.raises(ApiError, match="not below --media-root"):
        Sources(root, False, 1, 1.0)._local(link.as_uri())


def test_a_clip_that_is_too_long(server, root):
    GOOD["100_s.mp4"](root / "long.mp4")
    with pytest.raises(openai.BadRequestError, match="110 s long; 60 s are the most"):
        server.chat(clip_part((root / "long.mp4").as_uri()))


class Listener:
    """A server of clips that counts connections."""

    def __init__(self, address: str, answer) -> None:
        listener = self
        self.connections = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                listener.connections += 1
                answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.server.handle_error = lambda *_: None  # clients that leave
        self.url = f"http://{address}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture(scope="module")
def web(root):
    """Two listeners: one on an address that the test takes for public, which redirects to the other one."""
    content = (root / "within.mp4").read_bytes()

    def private(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    def public(handler):
        target = {"/there": f"{inner.url}/clip", "/round": "/round", "/here": "/clip", "/odd": "file:///etc/passwd"}
        if target.get(handler.path):
            handler.send_response(302)
            handler.send_header("Location", target[handler.path])
        elif handler.path == "/missing":
            handler.send_response(404)
        else:
            handler.send_response(200)
        handler.end_headers()
        if handler.path == "/large":
            handler.wfile.write(b" " * 200_000)
        elif handler.path == "/slow":
            for _ in range(100):
                handler.wfile.write(b" ")
                time.sleep(0.1)
        elif handler.path == "/list":
            handler.wfile.write((root / "list.m3u8").read_bytes())
        elif handler.path == "/clip":
            handler.wfile.write(content)

    inner, outer = Listener("127.0.0.2", private), Listener("127.0.0.3", public)
    yield inner, outer
    inner.server.shutdown()
    outer.server.shutdown()


def test_no_request_goes_out_unless_allowed(server, web):
    for listener in web:
        with pytest.raises(openai.PermissionDeniedError, match="--allow-remote"):
            server.chat(clip_part(f"{listener.url}/clip"))
        assert listener.connections == 0


def test_downloads(web, root):
    """Only public addresses, also behind redirects and other ways to write them; within the limits."""
    inner, outer = web
    with running("--remote", "--public", "127.0.0.3") as server:
        expected = stub_server.digest(read_media(root / "within.mp4", stub_server.READING))
        for path in ("/clip", "/here"):
            assert server.described(clip_part(outer.url + path))["clip"] == expected
        port = inner.server.server_port
        for url, reason in (
            (f"{inner.url}/clip", "not public"),
            (f"{outer.url}/there", "not public"),
            (f"http://localhost:{server.port}/health", "not public"),
            (f"http://[::1]:{port}/clip", "not public"),
            (f"http://[::ffff:127.0.0.2]:{port}/clip", "not public"),
            (f"http://2130706434:{port}/clip", "cannot"),
            (f"http://0177.0.0.2:{port}/clip", "cannot"),
            (f"http://127.2:{port}/clip", "cannot"),
            ("http://169.254.169.254/latest/meta-data", "not public"),
            (f"http://user:word@127.0.0.3:{outer.server.server_port}/clip", "plain"),
            (f"{outer.url}/odd", "plain"),
            (f"{outer.url}/round", "redirects more"),
            (f"{outer.url}/missing", "404"),
            (f"{outer.url}/large", "more than 100000 bytes"),
            (f"{outer.url}/slow", "within 3 s"),
            (f"{outer.url}/list", "the clip: not a video"),
        ):
            with pytest.raises(openai.APIStatusError, match=reason) as raised:
                server.chat(clip_part(url))
            assert raised.value.status_code in (400, 413), url
        assert inner.connections == 0
        assert server.metric("requests_in_flight") == 0


PUBLIC = ("8.8.8.8", "2606:4700::1")
PRIVATE = (
    *("10.0.0.1", "100.64.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "127.0.0.1", "0.0.0.0", "224.0.0.1"),
    *("255.255.255.255", "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
    *("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"),  # an IPv4 address in an IPv6 address
)


def test_public_addresses():
    assert all(map(is_public, PUBLIC))
    assert not any(map(is_public, PRIVATE))


def test_more_requests_than_the_queue_takes(server):
    """Of 200 at once, as many are answered as the queue takes, and the others get 429 at once."""

    async def ask() -> list:
        async with openai.AsyncOpenAI(**server.options) as client:
            messages = [{"role": "user", "content": "slow"}]
            requests = (client.chat.completions.create(model="stub", messages=messages) for _ in range(200))
            return await asyncio.gather(*requests, return_exceptions=True)

    answers = asyncio.run(ask())
    refused = [one for one in answers if isinstance(one, openai.RateLimitError)]
    answered = [one for one in answers if not isinstance(one, Exception)]
    assert len(refused) + len(answered) == 200
    assert len(answered) >= 8
    assert len(refused) > 100
    assert refused[0].response.headers["Retry-After"] == "1"
    assert all(one.choices[0].message.content == " ".join(stub_server.WORDS) for one in answered)
    server.wait_for("requests_in_flight", 0)


def test_a_client_that_disconnects(server):
    """Its request ends, streaming or not, and so do requests whose body has not arrived."""
    before = server.metric('requests_total{status="499"}')
    stream = server.chat("slow", stream=True)
    next(stream)
    stream.close()
    body = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "stuck"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json"
    for sent in (body, body[:20]):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + sent)
        server.wait_for("requests_in_flight", 1)
        connection.close()
        server.wait_for("requests_in_flight", 0)
    server.wait_for('requests_total{status="499"}', before + 3)


def test_internal_errors_are_not_shown(server):
    with pytest.raises(openai.InternalServerError) as raised:
        server.chat("fails")
    assert "secret" not in str(raised.value)
    with pytest.raises(openai.APIError, match="internal error"):
        list(server.chat("breaks", stream=True))
    assert server.metric('requests_total{status="500"}') == 2


def test_nothing_is_left_of_requests(server, root):
    """No descriptor, no temporary file."""
    content = (root / "within.mp4").read_bytes()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    def ask() -> None:
        server.chat(clip_part(data_url(content)))
        with pytest.raises(openai.BadRequestError):
            server.chat(clip_part(data_url(content[:3000])))

    ask()
    before = descriptors()
    for _ in range(5):
        ask()
    assert descriptors() <= before
    assert not list(Path("/tmp").glob("avocado-serve-*"))


def test_a_request_has_its_time():
    with running("--seconds", 0.3) as server:
        with pytest.raises(openai.InternalServerError, match="within 0\\.3 s") as raised:
            server.chat("stuck")
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="within 0\\.3 s"):
            list(server.chat("slow", stream=True))
        assert server.chat("a").choices
        assert server.metric('requests_total{status="504"}') == 2


def in_threads(*calls) -> list:
    """The results, or the errors, of calls that run at once."""
    results = [None] * len(calls)

    def run(number, call):
        try:
            results[number] = call()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    return [results, threads]


@pytest.mark.parametrize("grace", [10, 0.2])
def test_sigterm_in_the_middle(grace):
    """Requests that are being answered finish; past the grace they end with an error. The exit status is 0."""
    with running("--grace", grace) as server:
        results, threads = in_threads(lambda: server.chat("slow"), lambda: list(server.chat("slow", stream=True)))
        server.wait_for("requests_in_flight", 2)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port))
        for thread in threads:
            thread.join()
        assert server.process.wait(10) == 0
    if grace > 1:
        assert results[0].choices[0].message.content == " ".join(stub_server.WORDS)
        assert results[1][-1].choices[0].finish_reason == "stop"
    else:
        assert "stopping" in str(results[0])
        assert results[0].status_code == 503
        assert "stopping" in str(results[1])


def test_curate_asks_this_server(tmp_path, monkeypatch, capsys):
    """Frames, sound and texts arrive as `curate` means them: the truth of a clip comes back."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "curation")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "curation"), *sys.path]))
    from teller import SMALL, make_clips, unique_keypoints

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
