"""Limits of the server, disconnected clients, internal errors, and shutdown."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import openai
import pytest
import stub_server
from running_server import KEY, clip_part, data_url, running


def test_excess_requests_get_429(server):
    """Of 200 concurrent requests, the queue limit determines how many are answered; the others get 429 at once."""

    async def ask() -> list:
        async with openai.AsyncOpenAI(**server.options) as client:
            messages = [{"role": "user", "content": "slow"}]
            requests = (client.chat.completions.create(model="stub", messages=messages) for _ in range(200))
            return await asyncio.gather(*requests, return_exceptions=True)

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    answered = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len(refused) + len(answered) == 200
    assert len(answered) >= 8
    assert len(refused) > 100
    assert refused[0].response.headers["Retry-After"] == "1"
    assert all(one.choices[0].message.content == " ".join(stub_server.WORDS) for one in answered)
    server.wait_for("requests_in_flight", 0)


def test_disconnected_client_frees_its_slot(server):
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


def test_requests_leave_no_descriptors_or_files(server, root):
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


def test_request_times_out():
    with running("--seconds", 0.3) as server:
        with pytest.raises(openai.InternalServerError, match="within 0\\.3 s") as raised:
            server.chat("stuck")
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="within 0\\.3 s"):
            list(server.chat("slow", stream=True))
        assert server.chat("a").choices
        assert server.metric('requests_total{status="504"}') == 2


def run_concurrently(*calls) -> list:
    """Results or errors of concurrent calls."""
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
def test_sigterm_during_a_request(grace):
    """Requests in progress finish, or end with an error after the grace period. The exit status is 0."""
    with running("--grace", grace) as server:
        results, threads = run_concurrently(lambda: server.chat("slow"), lambda: list(server.chat("slow", stream=True)))
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
