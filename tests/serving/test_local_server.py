"""Parts of the server without a socket, and access to a server without a key."""

import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from running_server import running

from avocado_jax.data.media import Media
from avocado_jax.data.prompt import Habits
from avocado_jax.serving import sources
from avocado_jax.serving.app import Limits, Server
from avocado_jax.serving.protocol import ApiError, parse_chat


def status_of(server, host):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(b"".join(iter(lambda: connection.recv(65536), b"")).split()[1])


def test_dns_rebinding_is_refused():
    with running() as server:
        assert status_of(server, f"127.0.0.1:{server.port}") == status_of(server, f"localhost:{server.port}") == 200
        assert status_of(server, f"[::1]:{server.port}") == 200
        assert status_of(server, f"evil.example:{server.port}") == status_of(server, "a") == 403


@pytest.mark.parametrize("media_first", [True, False])
def test_question_position_follows_the_checkpoint(media_first):
    clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [clip]}]}
    (turn,) = parse_chat(json.dumps(body).encode(), "What happens?", "", media_first).turns
    assert (turn.text, turn.after) == (("", "What happens?") if media_first else ("What happens?", ""))


def server_with(reader):
    return Server(None, "m", reader, None, Habits(), None, Limits(clip_seconds=30.0))


def test_time_limit_applies_to_clips_given_as_images():
    media = Media(np.zeros((1, 28, 28, 3), np.uint8), None, 31.0)
    with pytest.raises(ApiError, match="31 s long; the limit is 30 s"):
        server_with(SimpleNamespace(read_parts=lambda *_: media))._read(["a.jpg"], video=False, sound=False)


def test_no_file_descriptors_are_left(monkeypatch):
    def fail(**_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(sources.tempfile, "TemporaryFile", fail)
    with pytest.raises(ApiError, match="cannot be stored") as error:
        sources._decode("data:video/mp4;base64,AAAA")
    assert error.value.status == 503
