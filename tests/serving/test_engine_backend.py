"""The backend between server and engine: answers, streams, limits, cancelled requests, errors.

The engine is a stub that decodes texts at known numbers of steps; `tests/sampling/test_engine.py` drops requests of the
real one, and the slow test here answers with it.
"""

import asyncio
import sys
import time
import zlib
from contextlib import aclosing
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import random_media

from avocado_jax.checkpoint.load import SHIPPED
from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import SYSTEM, Habits, Turn
from avocado_jax.data.words import load_words
from avocado_jax.models.config import TINY
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.logits import GREEDY, Sampling
from avocado_jax.serving import engine as module
from avocado_jax.serving.engine import EngineBackend
from avocado_jax.serving.protocol import ApiError, Chat, ChatRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from test_engine import LENGTH, SEED, SIZES, captioner, one_by_one, rows  # noqa: F401

STEPS = 16
STOP = 1
USER = [{"role": "user", "content": "a"}]


def chat(number, limit=None, **fields):
    """A question about clip `number`."""
    turns = (Turn("system", SYSTEM), Turn("user", "", f"What? {'Why? ' * (number % 3)}"))
    return Chat(turns, None, (), None, limit, ChatRequest(model="m", messages=USER, **fields))


def clip(number):
    return random_media(*SIZES[number % len(SIZES)], seed=number)


def sampling_number(seed) -> int:
    """The sampling number of a request with this seed."""
    return zlib.crc32(str(seed).encode()) >> 1


def tokens_of(number, sampling):
    """Tokens that the stub decodes, by number and sampling; every other caption is truncated."""
    many = 3 + number % 29 if number % 2 else LENGTH
    ids = (100 + (number + int(100 * sampling.temperature) + np.arange(many)) % 150).astype(np.int32)
    return np.append(ids, STOP)[:LENGTH]


class StubEngine:
    """Decodes up to three captions at a time, `STEPS` tokens per step.

    Attributes:
        error: what happens to the next clip: an exception to raise, or to yield if it is a MemoryError.
        most: the largest number of tokens that were decoded of a dropped caption.
    """

    error, most = None, 0

    def __init__(self, _, length, sampling, seed, slots, cache_bytes, drop):
        self.sampling, self.drop = sampling, drop

    def run(self, requests):
        for item, row, number in requests:
            assert row.prompt_ids is not None
            if isinstance(StubEngine.error, MemoryError):
                yield item, StubEngine.error
                continue
            if StubEngine.error:
                raise StubEngine.error
            tokens = tokens_of(number, self.sampling)
            for step in range(0, len(tokens) + STEPS, STEPS):
                if step >= len(tokens):
                    yield item, tokens
                elif self.drop(item, tokens[:step]):
                    StubEngine.most = max(StubEngine.most, step)
                    break
                time.sleep(0.005)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(module, "Engine", StubEngine)
    monkeypatch.setattr(StubEngine, "error", None)
    monkeypatch.setattr(StubEngine, "most", 0)
    empty = Captioner(*[None] * len(Captioner._fields))
    reading = Reading(fewest_pixels=784, asked_pixels=6000)
    return empty._replace(config=TINY, tokenizer=load_words(SHIPPED), stops=(STOP,), reading=reading, habits=Habits())


async def ask(backend, request, media):
    """All answers of a request."""
    prepared, _ = await backend.prepare(request, media)
    return [answer async for answer in backend.answers(prepared)]


def run(captioner, work, **options):  # noqa: F811
    """The result of `work(backend)` in an event loop."""

    async def running():
        backend = EngineBackend(captioner, LENGTH, 2000, GREEDY, **{"seed": SEED, "slots": 3, **options})
        backend.start()
        try:
            return await work(backend)
        finally:
            assert await asyncio.to_thread(backend.close, 60)

    return asyncio.run(running())


def test_answers_equal_the_captions(stub):
    """Ten requests at once, half of them streams, and one with a limit; each gets its caption."""

    async def work(backend):
        requests = [chat(i, seed=i, stream=i % 2 == 0) for i in range(10)] + [chat(0, seed=0, limit=3)]
        return await asyncio.gather(*(ask(backend, request, clip(i)) for i, request in enumerate(requests)))

    *made, limited = run(stub, work)
    for i, answers in enumerate(made):
        expected = tokens_of(sampling_number(i), GREEDY)
        last = answers[-1]
        assert last.text == words(stub, expected)
        assert (last.tokens, last.truncated) == (len(expected), expected[-1] != STOP)
        assert len(answers) == (1 + (len(expected) - 1) // STEPS if i % 2 == 0 else 1)
        assert [answer.complete for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert last.text.startswith(answers[0].text)
    assert len({answers[-1].truncated for answers in made}) == 2
    assert limited[-1].text == words(stub, tokens_of(sampling_number(0), GREEDY)[:3])
    assert (limited[-1].tokens, limited[-1].truncated, len(limited)) == (3, True, 1)
    assert StubEngine.most == STEPS  # an answer that has its tokens ends


def test_disconnected_client_cancels_its_request(stub):
    """Its request is cancelled, in a slot or in the queue; the others are answered."""

    async def work(backend):
        job, _ = await backend.prepare(chat(0, stream=True), clip(0))
        job.number = 0  # a long one
        async with aclosing(backend.answers(job)) as answers:
            async for _ in answers:
                break
        waiting, _ = await backend.prepare(chat(0), clip(0))
        task = asyncio.ensure_future(anext(backend.answers(waiting)))
        await asyncio.sleep(0)
        task.cancel()
        other = (await ask(backend, chat(1, seed=1), clip(1)))[-1]
        dropped = [backend._drop(one, np.zeros(1, np.int32)) for one in (job, waiting)]  # what the engine asks
        return other, dropped, backend._jobs

    other, dropped, left = run(stub, work)
    assert other.text == words(stub, tokens_of(sampling_number(1), GREEDY))
    assert dropped == [True, True]
    assert not left


def test_number_of_sampling_settings_is_bounded(stub, monkeypatch):
    """Each request has its own sampling; temperature 0 equals the default; the number of settings is limited."""
    monkeypatch.setattr(module, "SAMPLINGS", 2)

    async def work(backend):
        warm = dict(temperature=0.7, top_p=0.9)
        requests = [chat(0, seed=3, **warm), chat(0, seed=3), chat(0, seed=4, **warm)]
        requests.append(chat(0, seed=3, temperature=0.0, top_p=0.5))
        made = [one[-1].text for one in await asyncio.gather(*(ask(backend, request, clip(0)) for request in requests))]
        with pytest.raises(ApiError, match="combinations"):
            await backend.prepare(chat(0, temperature=0.5), clip(0))
        with pytest.raises(ApiError, match="temperature"):
            await backend.prepare(chat(0, temperature=1e-6), clip(0))
        numbers = [(await backend.prepare(chat(0), clip(0)))[0].number for _ in range(3)]
        return made, numbers

    made, numbers = run(stub, work)
    warm, greedy = Sampling(0.7, 0, 0.9), GREEDY
    expected = [tokens_of(sampling_number(seed), how) for seed, how in ((3, warm), (3, greedy), (4, warm), (3, greedy))]
    assert made == [words(stub, one) for one in expected]
    assert len(set(numbers)) == 3  # without a seed, draws differ
    assert max(numbers) < 2**31


def test_default_sampling(stub):
    """The server's defaults apply to unset fields of a request."""
    backend = EngineBackend(stub, LENGTH, 2000, Sampling(0.7, 5, 0.9))
    assert backend._sampling_of(chat(0)) == Sampling(0.7, 5, 0.9)
    assert backend._sampling_of(chat(0, top_p=0.5)) == Sampling(0.7, 5, 0.5)
    assert backend._sampling_of(chat(0, temperature=1, top_k=0)) == Sampling(1.0, 0, 0.9)
    assert backend._sampling_of(chat(0, temperature=0)) == GREEDY


def test_text_only_and_long_prompts(stub):
    async def work(backend):
        text = Chat((Turn("user", "Who?"),), None, (), None, 5, chat(0).request)
        answer = (await ask(backend, text, None))[-1]
        long = text._replace(turns=(Turn("user", "Who? " * 3000),))
        for media in (None, clip(0)):
            turns = long.turns if media is None else (Turn("user", "", long.turns[0].text),)
            with pytest.raises(ApiError, match="tokens") as raised:
                await backend.prepare(long._replace(turns=turns), media)
            assert raised.value.status == 400
        backend._captioner = stub._replace(tokenizer=None)  # the longest texts are not tokenized
        with pytest.raises(ApiError, match="more than 2000 tokens"):
            await backend.prepare(long._replace(turns=(Turn("user", "W" * 64_001),)), None)
        backend._captioner = stub
        _, warnings = await backend.prepare(chat(0), clip(0)._replace(warnings=("dark",)))
        return answer, warnings

    answer, warnings = run(stub, work)
    assert answer.tokens in range(1, 6)
    assert answer.prompt_tokens > 0
    assert warnings == ["dark"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(MemoryError("no"), 400), (jax.errors.JaxRuntimeError("INTERNAL: no"), 500)],
)
def test_device_errors_become_responses(stub, monkeypatch, error, status):
    """Out of memory fails the clip only; every other error fails all requests, and the server exits."""
    monkeypatch.setattr(StubEngine, "error", error)

    async def work(backend):
        made = await asyncio.gather(*(ask(backend, chat(i), clip(i)) for i in range(2)), return_exceptions=True)
        await asyncio.sleep(0.05)
        assert backend.failed.is_set() == (status == 500)
        if status == 500:
            assert backend.error is error
            with pytest.raises(ApiError, match="stopping"):
                await ask(backend, chat(0), clip(0))
        return made

    made = run(stub, work)
    statuses = {one.status for one in made}
    assert status in statuses
    assert statuses <= {status, 503}  # the second request may come after the failure


@pytest.mark.slow
def test_backend_with_the_real_engine(captioner, rows, one_by_one):  # noqa: F811
    """Prompts and answers equal those of `caption`, for concurrent clips of unequal sizes and for texts alone."""
    expected = one_by_one[GREEDY]

    async def work(backend):
        for i, row in enumerate(rows):
            job, _ = await backend.prepare(chat(i), clip(i))
            np.testing.assert_array_equal(job.row.prompt_ids, row.prompt_ids)
        text = Chat((Turn("user", "Who?"),), None, (), None, 5, chat(0).request)
        requests = [(chat(i, stream=i % 2 == 0), clip(i)) for i in range(len(rows))] + [(text, None)]
        return await asyncio.gather(*(ask(backend, *request) for request in requests))

    *made, text = run(captioner, work)
    for i, answers in enumerate(made):
        assert answers[-1].text == words(captioner, np.array(expected[i]))
        assert answers[-1].tokens == len(expected[i])
        assert answers[-1].prompt_tokens == len(rows[i].prompt_ids)
    assert text[-1].tokens in range(1, 6)


def test_default_sampling_is_always_accepted(stub, monkeypatch):
    """Other sampling settings do not use up its place, and refused requests use none."""
    monkeypatch.setattr(module, "SAMPLINGS", 3)

    async def work(backend):
        large = chat(0, temperature=0.1)._replace(turns=(Turn("user", "a " * 100_000),))
        with pytest.raises(ApiError, match="tokens"):
            await backend.prepare(large, None)
        for temperature in (0.2, 0.3):
            await backend.prepare(chat(0, temperature=temperature), clip(0))
        with pytest.raises(ApiError, match="combinations"):
            await backend.prepare(chat(0, temperature=0.4), clip(0))
        return await backend.prepare(chat(0), clip(0))

    assert run(stub, work)[0].sampling == GREEDY
