"""Appending to an object if the response of the storage is lost."""

import pytest

from avocado_jax.data import appended, storage
from avocado_jax.data.storage import StorageError


def test_append_is_repeated_once_if_its_response_was_lost(monkeypatch):
    """Later lines are appended after it, once."""
    content, lost = bytearray(), [True]

    def append(path, data, size):
        if len(content) == size + len(data):  # as `storage.append`: an earlier attempt was successful
            return
        assert len(content) == size, "another process writes to it"
        content.extend(data)
        if lost and lost.pop():
            raise StorageError("no answer")

    monkeypatch.setattr(storage, "append", append)
    monkeypatch.setattr(appended, "INTERVAL", 1e9)
    lines = appended.RemoteLines("gs://bucket/lines", 0)
    lines.append(b"one\n")
    with pytest.raises(StorageError):
        lines.flush()
    lines.append(b"two\n")
    lines.flush()
    lines.flush()
    assert content == b"one\ntwo\n"
