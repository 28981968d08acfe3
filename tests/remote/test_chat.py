"""The client against a real server: requests, cache and budget. For failures see tests/rewards/test_judge.py."""

import json
import time
from pathlib import Path

import pytest
from chat import chat, chat_server
from pydantic import BaseModel, Field

from avocado_jax.errors import InputError
from avocado_jax.remote import chat as module
from avocado_jax.remote.answers import objects, read_object, response_format
from avocado_jax.remote.call import Malformed
from avocado_jax.remote.chat import ChatClient, Endpoint, Reply, estimate

PARTS = [
    {"type": "text", "text": "What is seen and heard?"},
    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA" * 4096, "format": "wav"}},
]
DOG = [{"role": "user", "content": "a dog?"}]


class Count(BaseModel):
    dogs: int = Field(ge=0, le=9)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module, "LAST_PAUSE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def count(text):
    return read_object(text, Count).dogs


def ask(client, messages=DOG, read=count, **more):
    return client.start(client.ask(messages, read, **more)).result()


def test_cache_in_a_bucket_is_refused(tmp_path, monkeypatch):
    """It is not written to a local folder called `gs:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs://bucket/answers: the judge's cache must be a local folder"):
        ChatClient(Endpoint("http://localhost/v1", "judge", cache=Path("gs://bucket/answers")))
    assert not list(tmp_path.iterdir())


def server_saying(*answers):
    """A server with these answers; the last one is repeated."""
    return chat_server(lambda number, _: answers[min(number, len(answers) - 1)])


def test_message_parts_and_options_are_sent_unchanged():
    with server_saying('{"dogs": 1}') as server, ChatClient(Endpoint(server.url, "m")) as client:
        reply = ask(client, [{"role": "user", "content": PARTS}], options={"max_tokens": 9, **response_format(Count)})
    assert reply == Reply(1, '{"dogs": 1}')
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": PARTS}]
    assert request["response_format"]["json_schema"]["schema"]["properties"]["dogs"]["type"] == "integer"
    assert estimate(request) == 9 + (23 // 3 + 8) + module.IMAGE_TOKENS + (4 + 8)


def test_raw_answers_are_cached_for_other_parsers(tmp_path):
    with server_saying('so {"dogs": 1}', '{"dogs": 2, "cats": 3}') as server:
        endpoint = Endpoint(server.url, "m", cache=tmp_path)
        with ChatClient(endpoint) as client:
            assert ask(client).value == 1
        with ChatClient(endpoint) as client:
            assert ask(client, read=len) == Reply(14, 'so {"dogs": 1}')
            assert ask(client, sample=1).value == 2
            assert dict(client.counts) == {"cached": 1, "calls": 1}
            assert ask(client, read=lambda text: json.loads(text)["cats"], sample=1).value == 3
    assert len(server.requests) == 2


def test_unparsable_answers_are_reported_and_not_cached(tmp_path):
    with (
        server_saying("one", "two", '{"dogs": 3}') as server,
        ChatClient(Endpoint(server.url, "m", cache=tmp_path, tries=2)) as client,
    ):
        reply = ask(client)
        assert (reply.value, reply.text) == (None, "two")
        assert "no JSON object" in reply.why
        assert ask(client).value == 3


@pytest.mark.parametrize("ended", ["length", "content_filter"])
def test_truncated_answers_are_discarded(ended):
    truncated = {"choices": [{"message": {"content": '{"dogs": 1}'}, "finish_reason": ended}]}
    with (
        server_saying(json.dumps(truncated).encode(), '{"dogs": 2}') as server,
        ChatClient(Endpoint(server.url, "m")) as one,
    ):
        assert ask(one).value == 2


def test_token_budget_is_never_exceeded():
    answer = json.loads(chat('{"dogs": 1}')) | {"usage": {"total_tokens": 300}}
    with (
        server_saying(json.dumps(answer).encode()) as server,
        ChatClient(Endpoint(server.url, "m", max_tokens=1000, options={"max_tokens": 290})) as client,
    ):
        replies = dict(client.run_all(client.ask(DOG, count, sample=number) for number in range(20)))
        assert [replies[number].value for number in range(20)].count(1) == 3
        assert client.tokens == 900
        assert "budget of 1000 tokens" in client.trouble
    assert len(server.requests) == 3


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": "9"}, {"total_tokens": -5}, {"total_tokens": True}])
def test_without_usage_tokens_are_estimated(usage):
    answer = json.loads(chat('{"dogs": 1}')) | {"usage": usage}
    with server_saying(json.dumps(answer).encode()) as server, ChatClient(Endpoint(server.url, "m")) as client:
        ask(client)
        assert client.tokens == estimate(server.requests[0])


def test_server_without_schema_support_gets_no_schema():
    def fault(number, request):
        if "response_format" in request:
            return (400, {}, b'{"error": "unknown field: response_format"}')
        return '{"dogs": 1}'

    with chat_server(fault) as server, ChatClient(Endpoint(server.url, "m")) as client:
        for sample in range(3):
            assert ask(client, options=response_format(Count), sample=sample).value == 1
    assert ["response_format" in request for request in server.requests] == [True, False, False, False]


def test_questions_are_drawn_lazily_with_bounded_concurrency():
    drawn = []

    def works(client):
        for number in range(30):
            drawn.append(number)
            yield client.ask([{"role": "user", "content": str(number)}], int)

    def echo(number, request):
        time.sleep(0.01)
        return request["messages"][0]["content"]

    with chat_server(echo) as server, ChatClient(Endpoint(server.url, "m", concurrency=4)) as client:
        each = client.run_all(works(client))
        next(each)
        assert len(drawn) < 10
        rest = list(each)
    assert len(rest) == 29
    assert all(number == reply.value for number, reply in rest)
    assert server.most <= 4


def test_queueing_does_not_count_as_patience():
    """Of two questions with a concurrency of one, the first is never answered; the second has its full patience."""
    with (
        chat_server(lambda number, _: "hang" if number == 0 else '{"dogs": 1}') as server,
        ChatClient(Endpoint(server.url, "m", concurrency=1, patience=2.0)) as client,
    ):
        replies = dict(client.run_all((client.ask(DOG, count, sample=number) for number in range(2)), at_once=2))
    assert sorted(reply.value is None for reply in replies.values()) == [False, True]
    assert client.counts["late"] == 1


@pytest.mark.parametrize(
    ("text", "dogs"),
    [
        ('{"dogs": 1} {"dogs": 2}', 2),
        ('<think>{"dogs": 9}</think>```json\n{"dogs": 0, "why": "none"}\n```', 0),
        ('{"dogs": 3} and {"note": "done {"}', 3),
        ('{"dogs": {"dogs": 3', None),
        ('{"dogs": "3"}', None),
        ('{"dogs": true}', None),
        ('{"dogs": 3.0}', None),
        ('{"dogs": 10}', None),
        ('{"dogs": 1, "dogs": 2}', None),
        ("{" * 10**5, None),
        ('{"a": ' * 10**5, None),
        ('{"dogs": ' + "9" * 10**4 + "}", None),
    ],
)
def test_parse_structured_answers(text, dogs):
    if dogs is None:
        with pytest.raises(Malformed):
            count(text)
    else:
        assert count(text) == dogs


def test_outermost_json_objects_are_found():
    assert objects('[{"a": {"b": 1}}, {"c": []}] {"d"') == [{"a": {"b": 1}}, {"c": []}]
