"""Clips that the server reads: damaged ones, files below the media root, downloads from public addresses."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
import stub_server
from clips import GOOD
from running_server import clip_part, data_url, running

from avocado_jax.data.decode import read_media
from avocado_jax.serving.download import is_public
from avocado_jax.serving.protocol import ApiError
from avocado_jax.serving.sources import Sources


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "concat.mp4", "empty.mp4", "noise.mp4", "cut.mp4"])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_clips_and_playlists_are_refused(server, root, name, stream):
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
def test_disallowed_urls_are_refused(server, root, name):
    with pytest.raises(openai.APIStatusError) as raised:
        server.chat(clip_part(REFUSED[name](root)))
    assert raised.value.status_code in (400, 403)


def test_file_replaced_after_the_check_is_not_read(root, tmp_path, monkeypatch):
    """The check applies to the opened file, not to the earlier target of its name."""
    link, real = root / "changing.mp4", os.open
    link.symlink_to("within.mp4")

    def replace_file(path, *options):
        link.unlink()
        link.symlink_to(root.parent / "outside" / "clip.mp4")
        return real(path, *options)

    monkeypatch.setattr(os, "open", replace_file)
    with pytest.raises(ApiError, match="not below --media-root"):
        Sources(root, False, 1, 1.0)._local(link.as_uri())


def test_too_long_clip_is_refused(server, root):
    GOOD["100_s.mp4"](root / "long.mp4")
    with pytest.raises(openai.BadRequestError, match="110 s long; the limit is 60 s"):
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
    """Two listeners: one on an address that the test treats as public, which redirects to the other one."""
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


def test_no_download_without_allow_remote(server, web):
    for listener in web:
        with pytest.raises(openai.PermissionDeniedError, match="--allow-remote"):
            server.chat(clip_part(f"{listener.url}/clip"))
        assert listener.connections == 0


def test_downloads_follow_the_rules(web, root):
    """Only public addresses, also after redirects and in other notations, and within the limits."""
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


def test_only_public_addresses_are_allowed():
    assert all(map(is_public, PUBLIC))
    assert not any(map(is_public, PRIVATE))
