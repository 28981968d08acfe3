"""The options of `serve`, and the command with the shipped captioner."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import openai
import pytest

from avocado_jax.__main__ import main
from avocado_jax.cli import serve as command
from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import Habits
from avocado_jax.data.reader import ClipReader
from avocado_jax.sampling.logits import Sampling


@pytest.fixture
def served(monkeypatch):
    """The arguments that the command passes on. Nothing is loaded, and no port is opened."""
    made = SimpleNamespace(error=None)

    class Backend:
        failed, error = None, None

        def __init__(self, *args, **options):
            made.backend, made.options = args, options
            made.started = made.closed = False
            self.error = made.error

        def start(self):
            made.started = True

        def close(self, seconds):
            made.closed = True
            return True

    async def serve(server, *where):
        made.server, made.where = server, where
        where[-1](1234)

    def load(checkpoint, text, dtype, mesh):
        made.loaded = text, dtype, mesh
        return SimpleNamespace(
            params={"a": np.zeros(1)},
            reading=Reading(fps=3.0),
            habits=Habits("own", "S", False),
            question=text or "own",
        )

    monkeypatch.setattr(command, "EngineBackend", Backend)
    monkeypatch.setattr(command, "serve", serve)
    monkeypatch.setattr(command, "load_captioner", load)
    monkeypatch.setattr(command, "free_cache_bytes", lambda params: 77)
    return made


def test_server_defaults(served, capsys):
    assert main(["serve"]) == 0
    captioner, *rest = served.backend
    assert rest == [2048, 65536, Sampling(0.0)]
    assert served.options == {"slots": None, "cache_bytes": 77}
    assert served.started
    assert served.closed
    host, port, grace, _ = served.where
    assert (host, port, grace) == ("127.0.0.1", 8000, 30)
    server = served.server
    assert (server.name, server.limits, server._key) == ("avocado", command.Limits(64, 64 * 2**20, 600, 600), None)
    assert (server._reading, server._habits) == (captioner.reading, Habits("own", "S", False))
    assert (server._sources._root, server._sources._remote) == (None, False)
    assert capsys.readouterr().err == "avocado serve: avocado at http://127.0.0.1:1234/v1\n"


def test_server_options(served, tmp_path, monkeypatch, capsys):
    """Each option reaches its consumer."""
    monkeypatch.setenv("SECRET", " word\n")
    options = {
        "host": "::",
        "port": 9,
        "api-key-env": "SECRET",
        "media-root": tmp_path,
        "max-requests": 3,
        "max-megabytes": 2,
        "max-clip-seconds": 5.5,
        "max-prompt-tokens": 100,
        "max-new-tokens": 11,
        "timeout": 7.5,
        "clip-seconds": 4,
        "grace": 0,
        "prompt": "Who?",
        "temperature": 0.5,
        "top-p": 0.25,
        "top-k": 6,
        "dtype": "bfloat16",
        "batch": 12,
        "mesh": "1,2",
    }
    readers = []
    monkeypatch.setattr(command, "ClipReader", lambda *given: readers.append(given) or ClipReader(*given))
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["serve", *given, "--allow-remote"]) == 0
    assert served.loaded == ("Who?", "bfloat16", (1, 2))
    assert served.backend[1:] == (11, 100, Sampling(0.5, 6, 0.25))
    assert served.options == {"slots": 12, "cache_bytes": 77}
    assert served.where[:3] == ("::", 9, 0)
    server = served.server
    assert server.limits == command.Limits(3, 2 * 2**20, 7.5, 5.5)
    assert server._key == b"word"
    assert server._habits.prompt == "Who?"
    sources = server._sources
    assert (sources._root, sources._remote, sources._limit) == (tmp_path.resolve(), True, 2 * 2**20)
    assert readers[0][1] == 4
    assert "http://[::]:1234/v1" in capsys.readouterr().err


def test_failed_device_ends_the_server(served):
    """A supervisor decides by the exit status whether to restart the server."""
    served.error = RuntimeError("UNAVAILABLE: gone")
    assert main(["serve"]) == 1
    served.error = RuntimeError("INTERNAL: broken")
    assert main(["serve"]) == 3


BAD = """--max-requests 0, --batch 0, --clip-seconds 0, --grace -1, --timeout nan, --temperature -1, --top-p 0,
--top-k -1, --media-root missing, --api-key-env UNSET_VARIABLE, --checkpoint missing, --mesh 1"""


@pytest.mark.parametrize("options", BAD.split(","))
def test_invalid_options_are_refused(served, capsys, options):
    assert main(["serve", *options.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_public_address_gives_a_warning(served, capsys):
    main(["serve", "--host", "0.0.0.0"])
    assert "no key is needed" in capsys.readouterr().err
    for host in ("localhost", "127.0.0.5", "::1"):
        main(["serve", "--host", host])
        assert "no key" not in capsys.readouterr().err


def test_model_name_of_a_reference(tmp_path):
    assert command._name(None) == "avocado"
    assert command._name(f"{tmp_path}/") == tmp_path.name
    assert command._name("gs://bucket/runs/one/") == "one"
    assert command._name("ORG/NAME@main") == "ORG/NAME@main"


def test_port_in_use_is_an_error(capsys, monkeypatch, served):
    from avocado_jax.serving.run import serve

    monkeypatch.setattr(command, "serve", serve)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "address already in use" in capsys.readouterr().err
    assert main(["serve", "--port", "99999"]) == 2


@contextmanager
def serving(*options):
    """Run the real command in a new process. Gives the client, the name of the model and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "avocado_jax", "serve", "--port", "0", *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    try:
        line = next(line for line in process.stderr if " at http://" in line)
        url = line.split(" at ")[1].strip()
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300), url, process
    finally:
        process.kill()
        process.communicate()


def chat(client, url, **options):
    """Request a caption."""
    content = [{"type": "video_url", "video_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="avocado", messages=messages, **options)


def make_clips(folder, count):
    assert main(["world", str(folder), "--clips", str(count), "--seed", "5", "--level", "0", "--split", "test"]) == 0
    return sorted((folder / "clips").iterdir())


@pytest.mark.slow
def test_served_captions_equal_the_caption_command(tmp_path, capsys):
    """With the shipped captioner, in fp32, greedy: by file and data URL, as a stream, all at once; then SIGTERM."""
    clips = make_clips(tmp_path, 2)
    done = subprocess.run(
        [sys.executable, "-m", "avocado_jax", "caption", *map(str, clips), "--json", "--max-new-tokens", "80"],
        capture_output=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    expected = [json.loads(line) for line in done.stdout.splitlines()]
    with serving("--media-root", tmp_path, "--max-new-tokens", 80) as (client, url, process):

        async def ask():
            async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as many:
                urls = [clip.as_uri() for clip in clips]
                urls += [f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}" for clip in clips]
                return await asyncio.gather(*(chat(many, one) for one in urls))

        for made, line in zip(asyncio.run(ask()), expected * 2, strict=True):
            assert made.choices[0].message.content == line["caption"]
            assert made.usage.completion_tokens == len(line["token_ids"])
            assert made.usage.prompt_tokens == len(line["prompt_ids"])
            assert (made.choices[0].finish_reason == "length") == line["truncated"]
        parts = [part.choices[0].delta.content or "" for part in chat(client, clips[0].as_uri(), stream=True)]
        assert "".join(parts) == expected[0]["caption"]
        assert len(parts) > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_curate_uses_the_shipped_captioner_as_endpoint(tmp_path, capsys):
    """It cannot write JSON, so the clip is rejected for its answers, but every question gets an answer."""
    (clip,) = make_clips(tmp_path, 1)
    capsys.readouterr()
    with serving("--max-new-tokens", 16) as (_, url, _):
        command = ["curate", str(clip), "--out", str(tmp_path / "out"), "--url", url, "--model", "avocado", "--json"]
        assert main([*command, "--fps", "2", "--frames", "4", "--pixels", "12544"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["kept"], counts["rejected"], counts["left"]) == (0, {"visual": 1}, 0)
