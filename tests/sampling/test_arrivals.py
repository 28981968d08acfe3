"""Clips that wait for the engine: their number is bounded, and a dispatch waits for several of them."""

import time

import pytest
from reference import random_media

from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.data.words import load_words
from avocado_jax.models.config import TINY
from avocado_jax.sampling import arrivals
from avocado_jax.sampling.captioner import captioner_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    captioner = captioner_of(TINY, {}, load_words(folder), (60,), "What?")
    return [captioner.row(random_media(4, 56, 84, 16000, seed=i), {"prompt": "What?"}) for i in range(4)]


def test_waiting_clips_are_bounded(rows, monkeypatch):
    """Reading continues when clips are consumed."""
    monkeypatch.setattr(arrivals, "WAITING_BYTES", 3 * arrivals.nbytes(rows[0]) - 1)
    read = []

    def requests():
        for number in range(20):
            read.append(number)
            yield number, rows[0], number

    waiting = arrivals.Arrivals(requests(), None)

    def settled():
        for _ in range(100):
            time.sleep(0.01)
            waiting.receive()
        return len(read)

    assert settled() == 3
    assert [one.item for one in waiting.take(waiting.shapes()[0], 2)] == [0, 1]
    assert settled() == 5
    waiting.close()


def test_clips_are_gathered_before_a_dispatch(rows):
    """Gathering ends at the requested number, at the end of the requests, or at the timeout."""
    given = [(i, rows[i], i) for i in range(4)]

    def gather_requests(requests, count, seconds=30.0):
        waiting, begun = arrivals.Arrivals(requests, None), time.monotonic()
        waiting.gather(count, seconds)
        found = sum(map(waiting.waiting, waiting.shapes(256)))
        waiting.close()
        return found, time.monotonic() - begun < 20

    def slow(then=0.0):
        for one in given:
            time.sleep(0.05)
            yield one
        time.sleep(then)

    assert gather_requests(slow(5.0), 3) == (3, True)
    assert gather_requests(slow(), 9) == (4, True)
    assert gather_requests(slow(5.0), 9, 0.5) == (4, True)
    assert gather_requests(given, 0) == (0, True)
