"""The engine behind the server: answers, streams, limits, requests that are dropped, errors."""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import random_media

from avocado_jax.data.prompt import SYSTEM, Turn
from avocado_jax.sampling import lane
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.captioner import words
from avocado_jax.sampling.engine import Engine
from avocado_jax.sampling.logits import GREEDY, Sampling
from avocado_jax.serving import engine as backends
from avocado_jax.serving.engine import EngineBackend
from avocado_jax.serving.protocol import ApiError, Chat, ChatRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from test_engine import LENGTH, SEED, SIZES, captioner, long_and_short, one_by_one, rows  # noqa: F401

USER = [{"role": "user", "content": "a"}]


def chat(number, limit=None, **fields):
    """A question about clip `number` of `rows`."""
    turns = (Turn("system", SYSTEM), Turn("user", "", f"What? {'Why? ' * (number % 3)}"))
    return Chat(turns, None, (), None, limit, ChatRequest(model="m", messages=USER, **fields))


def clip(number):
    return random_media(*SIZES[number % len(SIZES)], seed=number)


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


def test_answers_are_the_captions(captioner, rows, one_by_one):  # noqa: F811
    """Ten requests at once, one of them a stream and one with a limit; each gets its caption."""
    expected = one_by_one[GREEDY]
    long = max(range(len(rows)), key=lambda one: len(expected[one]))

    async def work(backend):
        requests = [chat(i, stream=i == long) for i in range(len(rows))] + [chat(long, limit=3)]
        for i, request in enumerate(requests[:-1]):
            job, _ = await backend.prepare(request, clip(i))
            np.testing.assert_array_equal(job.row.prompt_ids, rows[i].prompt_ids)
        clips = [*range(len(rows)), long]
        return await asyncio.gather(*(ask(backend, one, clip(i)) for one, i in zip(requests, clips)))

    *made, limited = run(captioner, work)
    for i, answers in enumerate(made):
        last = answers[-1]
        assert last.text == words(captioner, np.array(expected[i]))
        assert last.tokens == len(expected[i])
        assert last.truncated == (expected[i][-1] not in captioner.stops)
        assert last.prompt_tokens == len(rows[i].prompt_ids)
        assert len(answers) > 1 if i == long else len(answers) == 1
    assert [one.complete for one in made[long]][-2:] == [False, True]
    assert made[long][-1].text.startswith(made[long][0].text)
    assert len(limited) == 1
    assert limited[0].text == words(captioner, np.array(expected[long][:3]))
    assert (limited[0].tokens, limited[0].truncated) == (3, True)


def test_a_dropped_request_frees_its_slot(captioner, rows, long_and_short, monkeypatch):  # noqa: F811
    """One slot: the long caption is dropped after three tokens, a request that is dropped before is not prefilled."""
    long, short, many, few = long_and_short
    dispatches, admitted = [], []
    advance, take = lane.Lane.advance, programs.admit
    monkeypatch.setattr(lane.Lane, "advance", lambda self: (dispatches.append(1), advance(self)))
    monkeypatch.setattr(programs, "admit", lambda *args, **kwargs: (admitted.append(1), take(*args, **kwargs))[1])

    def drop(item, tokens):
        return item == "never" or (item == long and len(tokens) >= 3)

    requests = [(long, rows[long], long), ("never", rows[long], 0), (short, rows[short], short)]
    made = list(Engine(captioner, LENGTH, GREEDY, SEED, 1, drop=drop).run(requests))
    assert [item for item, _ in made] == [short]
    assert len(dispatches) <= 3 + few + 1 < many + few
    assert len(admitted) == 2


def test_a_client_that_leaves(captioner, rows, one_by_one):  # noqa: F811
    """Its request is dropped; the others are answered."""
    expected = one_by_one[GREEDY]
    long = max(range(len(rows)), key=lambda one: len(expected[one]))

    async def work(backend):
        job, _ = await backend.prepare(chat(long, stream=True), clip(long))
        async with aclosing(backend.answers(job)) as answers:
            async for _ in answers:
                break
        waiting, _ = await backend.prepare(chat(0), clip(0))
        task = asyncio.ensure_future(anext(backend.answers(waiting)))
        await asyncio.sleep(0)
        task.cancel()
        other = (await ask(backend, chat(1), clip(1)))[-1]
        news = [one._news.get_nowait() for one in (job, waiting) for _ in range(one._news.qsize())]
        return other, news, backend._jobs

    other, news, left = run(captioner, work, slots=1)
    assert other.text == words(captioner, np.array(expected[1]))
    assert not any(complete for _, complete in news)
    assert not left


def test_ways_of_sampling(captioner, monkeypatch):  # noqa: F811
    """A seed decides the draws; temperature 0 is the default; their number is limited."""
    monkeypatch.setattr(backends, "SAMPLINGS", 2)

    async def work(backend):
        warm = dict(temperature=0.7, top_p=0.9)
        requests = [chat(0, seed=3, **warm), chat(0), chat(0, seed=3, **warm), chat(0, temperature=0.0, top_p=0.5)]
        requests.append(chat(0, seed=4, **warm))
        made = [one[-1].text for one in await asyncio.gather(*(ask(backend, one, clip(0)) for one in requests))]
        with pytest.raises(ApiError, match="combinations"):
            await backend.prepare(chat(0, temperature=0.5), clip(0))
        with pytest.raises(ApiError, match="temperature"):
            await backend.prepare(chat(0, temperature=1e-6), clip(0))
        return made

    first, greedy, again, same, other = run(captioner, work)
    assert first == again
    assert greedy == same
    assert len({first, greedy, other}) == 3


def test_texts_alone_and_long_prompts(captioner):  # noqa: F811
    async def work(backend):
        text = Chat((Turn("user", "Who?"),), None, (), None, 5, chat(0).request)
        answer = (await ask(backend, text, None))[-1]
        long = text._replace(turns=(Turn("user", "Who? " * 3000),))
        for media in (None, clip(0)):
            with pytest.raises(ApiError, match="tokens") as raised:
                await backend.prepare(long, media)
            assert raised.value.status == 400
        backend._captioner = captioner._replace(tokenizer=None)  # the longest texts are not tokenized
        with pytest.raises(ApiError, match="more than 2000 tokens"):
            await backend.prepare(long._replace(turns=(Turn("user", "W" * 64_001),)), None)
        backend._captioner = captioner
        return answer

    assert run(captioner, work).tokens in range(1, 6)


@pytest.mark.parametrize(("code", "status"), [("RESOURCE_EXHAUSTED", 400), ("INTERNAL", 500)])
def test_errors_of_the_devices(captioner, monkeypatch, code, status):  # noqa: F811
    """Too little memory for a clip is its error; every other one fails all requests, and the server ends."""

    def admit(*_, **__):
        raise jax.errors.JaxRuntimeError(f"{code}: no")

    monkeypatch.setattr(programs, "admit", admit)

    async def work(backend):
        made = await asyncio.gather(*(ask(backend, chat(i), clip(i)) for i in range(2)), return_exceptions=True)
        failed = backend.failed.is_set() or await asyncio.sleep(0.1) or backend.failed.is_set()
        assert failed == (status == 500)
        if failed:
            assert "INTERNAL" in str(backend.error)
            with pytest.raises(ApiError, match="stopping"):
                await ask(backend, chat(0), clip(0))
        return made

    made = run(captioner, work)
    assert [one.status for one in made] == [status] * 2


def test_default_sampling(captioner):  # noqa: F811
    """What a request does not state is the server's."""
    backend = EngineBackend(captioner, LENGTH, 2000, Sampling(0.7, 5, 0.9))
    assert backend._sampling_of(chat(0)) == Sampling(0.7, 5, 0.9)
    assert backend._sampling_of(chat(0, top_p=0.5)) == Sampling(0.7, 5, 0.5)
    assert backend._sampling_of(chat(0, temperature=1, top_k=0)) == Sampling(1.0, 0, 0.9)
    assert backend._sampling_of(chat(0, temperature=0)) == GREEDY
