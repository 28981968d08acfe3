"""A server for the OpenAI chat protocol over a real socket, with injected faults."""

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "127.0.0.1"


def verdicts(request: dict[str, Any]) -> dict[str, str]:
    """A simple honest judge: a statement or choice is true if its words occur in the description."""
    question = json.loads(request["messages"][1]["content"])
    if "questions" in question:
        return {
            number: next((letter for letter, text in one["choices"].items() if text in question["description"]), "N/A")
            for number, one in question["questions"].items()
        }
    return {
        number: "yes" if text in question["description"] else "no" for number, text in question["statements"].items()
    }


def chat(text: Any) -> bytes:
    """The response body for a text."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class ChatServer:
    """Answers honestly unless `fault(number of the request, request)` returns a fault.

    That is None, or what happens instead: a text that the model says; bytes, the body; (status, headers, body); or
    "reset", "hang", "garbage" (not HTTP), "cut" (the body ends early), "trickle" (a byte now and then, for ever).

    Attributes:
        requests: what was asked, in order, with the header "Authorization".
        most: the largest number of requests answered at once.
    """

    def __init__(self, fault: Callable[[int, dict], Any] = lambda number, request: None, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.now = self.most = 0
        self._lock, self._ending = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request |= {"path": self.path, "authorization": self.headers["Authorization"]}
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(request)
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    self.act(fault(number, request), request)
                finally:
                    with server._lock:
                        server.now -= 1

            def act(self, fault: Any, request: dict) -> None:
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                elif fault == "hang":
                    server._ending.wait()
                    self.close_connection = True
                elif fault == "garbage":
                    self.wfile.write(b"\x00\xff and so on\r\n\r\n")
                    self.close_connection = True
                elif fault in ("cut", "trickle"):
                    body = chat(json.dumps(verdicts(request)))
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body) * 1000))
                    self.end_headers()
                    self.wfile.write(body[:20])
                    while fault == "trickle" and not server._ending.wait(0.05):
                        self.wfile.write(b" ")
                    self.close_connection = True
                elif isinstance(fault, tuple):
                    self.answer(*fault)
                else:
                    reply = json.dumps(verdicts(request)) if fault is None else fault
                    self.answer(200, {}, reply if isinstance(reply, bytes) else chat(reply))

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # clients that gave up
                pass

        self._server = Server((HOST, port), Handler)
        self.port = self._server.server_port
        self.url = f"http://{HOST}:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Stop at once, also with hanging requests."""
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def chat_server(fault: Callable[[int, dict], Any] = lambda number, request: None, port: int = 0):
    """Run a server for the duration of the block."""
    server = ChatServer(fault, port)
    try:
        yield server
    finally:
        server.close()
