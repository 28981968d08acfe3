"""Storage calls with slow, broken, refused and checksum-less responses of a real storage server."""

import hashlib
import os
import time

import gcs
import google.auth
import google.cloud.storage.blob
import pytest
from google.auth.exceptions import DefaultCredentialsError

from avocado_jax.data import storage
from avocado_jax.data.timeouts import retried
from avocado_jax.errors import InputError

CHUNK = 256 * 1024
DATA = bytes(range(256)) * (6 * CHUNK // 256)
PATH = "gs://bucket/folder/file"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a storage server with the bucket gs://bucket."""
    root = tmp_path_factory.mktemp("storage")
    (root / "bucket").mkdir()
    with gcs.storage_server(root) as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy before the server; uploads are resumable and in small chunks."""
    monkeypatch.setattr(google.cloud.storage.blob, "_MAX_MULTIPART_SIZE", 1000)
    monkeypatch.setattr(storage, "CHUNK", CHUNK)
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    proxy = gcs.Proxy(server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    storage._client.cache_clear()
    yield proxy
    proxy.close()
    storage._client.cache_clear()


def healed(proxy):
    """Remove the faults of the proxy and clear its requests."""
    proxy.faulty, proxy.delay = lambda method, path: False, 0.0
    proxy.requests.clear()
    return proxy


def upload_requests(proxy):
    """(sessions, chunks) of uploads so far."""
    sessions = sum(method == "POST" for method, _ in proxy.requests)
    return sessions, sum(method == "PUT" for method, _ in proxy.requests)


def test_long_upload_resumes_from_the_broken_chunk(proxy, tmp_path):
    """Every third chunk is reset or gets 408; only these are sent again."""
    proxy.faulty, proxy.every, proxy.faults, proxy.delay = (
        (lambda method, path: method == "PUT"),
        3,
        ("reset", 408),
        0.05,
    )
    (tmp_path / "file").write_bytes(DATA)
    begun = time.monotonic()
    storage.upload(tmp_path / "file", PATH)
    assert time.monotonic() - begun > storage.PATIENCE
    assert not (tmp_path / "file").exists()
    assert (proxy.hits["reset"], proxy.hits[408]) == (2, 1)
    assert upload_requests(proxy) == (1, 6 + 3)
    assert storage.read(PATH) == DATA


def test_upload_timeout_starts_at_the_first_failure(proxy):
    """A request that breaks after more than the timeout is retried; a request that keeps failing is not."""
    storage.write(PATH, DATA)
    proxy.faulty, proxy.every, proxy.faults, proxy.delay = (lambda method, path: True), 2, ("reset",), 0.25
    assert storage.read(PATH) == DATA
    assert storage.size(PATH) == len(DATA)
    storage.write("gs://bucket/small", b"small")
    assert proxy.hits["reset"] == 3
    proxy.every, proxy.delay = 1, 0.0
    begun = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"gs://bucket/folder/file: .*Connection"):
        storage.read(PATH)
    assert storage.PATIENCE < time.monotonic() - begun < 60


def test_timeout_of_other_calls_starts_at_the_first_failure():
    attempts = []

    def call():
        attempts.append(time.sleep(0.3))
        if len(attempts) == 1:
            raise ConnectionError
        return "content"

    assert retried(call, "name", (ConnectionError,), patience=0.2) == "content"


def test_download_resumes_while_it_makes_progress(proxy):
    """Connections end early for longer than the timeout, each after half of the remaining bytes."""
    storage.write(PATH, DATA)
    healed(proxy)
    proxy.faulty, proxy.every, proxy.faults = (lambda method, path: len(proxy.requests) < 5), 1, ("truncated",)
    proxy.delay = 0.1
    assert storage.read(PATH) == DATA
    assert proxy.hits["truncated"] == 4
    proxy.faulty = lambda method, path: len(proxy.requests) < 3
    proxy.requests.clear()
    assert storage.read_range(PATH, 1000, CHUNK) == DATA[1000:][:CHUNK]


@pytest.mark.parametrize("lost", [410, "part of a chunk"])
def test_upload_restarts_if_its_session_is_lost(proxy, lost):
    if lost == 410:
        proxy.faulty, proxy.every, proxy.faults = (lambda method, path: method == "PUT"), 20, (410,)
    else:
        proxy.kept = 1000
    storage.write(PATH, DATA)
    assert upload_requests(proxy)[0] == 2
    assert storage.read(PATH) == DATA


@pytest.mark.parametrize("status", [408, 429, 502])
def test_transient_statuses_are_retried(proxy, status):
    proxy.faulty, proxy.faults = (lambda method, path: True), (status,)
    storage.write(PATH, b"content")
    assert storage.read(PATH) == b"content"
    assert storage.size(PATH) == 7
    assert storage.names("gs://bucket/folder") == ["file"]
    storage.delete(PATH)
    assert not storage.exists(PATH)
    storage.delete(PATH)
    assert proxy.hits[status] >= 6


def test_denied_object_fails_without_retries(proxy):
    storage.write(PATH, b"content")
    storage.write("gs://bucket/folder/other", b"content")
    healed(proxy).denied, proxy.denied_path = {"storage.objects.get"}, "other"
    with pytest.raises(InputError, match=r"gs://bucket: no storage.objects.get permission; grant roles/storage.object"):
        storage.read("gs://bucket/folder/other")
    assert len(proxy.requests) == 1
    assert storage.read(PATH) == b"content"


@pytest.fixture
def real_client(proxy, monkeypatch):
    """The client without an emulator variable, with the proxy instead of Google's server."""
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", proxy.url)
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    storage._client.cache_clear()
    return proxy


def refused(*_):
    raise DefaultCredentialsError("none were found")


def test_public_bucket_needs_no_credentials(real_client, proxy, monkeypatch):
    public = "gs://bucket/public/file"
    monkeypatch.setattr(google.auth, "default", refused)
    storage.write(public, DATA)
    proxy.private = "secret"
    assert storage.read(public) == DATA
    assert storage.names("gs://bucket/public") == ["file"]
    assert storage.fingerprint(public) == hashlib.md5(DATA).hexdigest()
    assert proxy.credentials == {None}
    assert os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] == "https://storage.googleapis.com"  # of array_record's client
    with pytest.raises(InputError, match=r"gs://bucket/secret: no credentials; use a service account"):
        storage.read("gs://bucket/secret")


def test_invalid_named_credentials_are_an_error(real_client, monkeypatch):
    """They are not replaced by anonymous access."""
    monkeypatch.setattr(google.auth, "default", refused)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    with pytest.raises(InputError, match=r"GOOGLE_APPLICATION_CREDENTIALS=/nowhere.json: none were found"):
        storage.read(PATH)


def test_application_default_credentials_are_used(real_client, proxy, monkeypatch):
    from google.oauth2.credentials import Credentials

    monkeypatch.setattr(google.auth, "default", lambda: (Credentials("token"), "project"))
    proxy.private = "/"
    storage.write(PATH, b"content")
    assert storage.read(PATH) == b"content"
    assert proxy.credentials == {"Bearer token"}


def test_object_without_md5_is_compared_by_content(proxy):
    """Composite objects have no MD5; the checksums that `prepare` recorded remain valid."""
    proxy.composite = True
    storage.write(PATH, DATA)
    assert storage.fingerprint(PATH) == hashlib.md5(DATA).hexdigest()
    assert storage.fingerprint("gs://bucket/none") is None


def test_content_type_is_stored(proxy):
    """So that a browser displays a report."""
    storage.write("gs://bucket/report.html", b"<html>")
    blob = storage._client().bucket("bucket").get_blob("report.html")
    assert blob.content_type == "text/html"


def test_large_range_is_read_in_concurrent_parts(proxy, monkeypatch):
    """Each byte is requested once, by at most `REQUESTS` concurrent requests over persistent connections."""
    storage.write(PATH, DATA)
    healed(proxy)
    monkeypatch.setattr(storage, "PART", 10_240)
    proxy.rounds = gcs.Rounds(storage.REQUESTS)
    assert storage.read_range(PATH, 1000, 5 * CHUNK) == DATA[1000:][: 5 * CHUNK]
    parts = 5 * CHUNK // 10_240  # a multiple of 32: no round waits for more
    assert proxy.ranges == [parts, 5 * CHUNK]
    assert proxy.rounds.count == parts // storage.REQUESTS
    assert proxy.peak <= storage.REQUESTS
    assert proxy.connections <= storage.REQUESTS + 1
    proxy.rounds, proxy.ranges = None, [0, 0]
    assert storage.read_range(PATH, 7, 0) == b""
    assert storage.read_range(PATH, len(DATA) - 5, 5) == DATA[-5:]
    assert proxy.ranges == [1, 5]
    buffer = bytearray(20_000)
    proxy.faulty, proxy.every, proxy.faults = (lambda method, path: True), 2, ("truncated", "reset")
    assert storage.read_into(PATH, 5, memoryview(buffer)) == 20_000
    assert buffer == DATA[5:20_005]
