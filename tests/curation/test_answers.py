"""Parsing of model answers: corrupted answers are parsed correctly or refused with a reason."""

import asyncio
import json
import os
import random
import wave
from collections import Counter
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from fake_curator import decoded
from hypothesis import given
from hypothesis import strategies as st

from avocado_jax.curation.answers import (
    Completeness,
    read_caption,
    read_dialogues,
    read_fused,
    read_keypoints,
    read_plain_caption,
    read_score,
)
from avocado_jax.curation.asking import Asker, Question
from avocado_jax.curation.content import jpeg, silent, wav
from avocado_jax.curation.journal import open_journal
from avocado_jax.curation.run import find_clips
from avocado_jax.curation.words import Sentence
from avocado_jax.data.media import Media
from avocado_jax.errors import InputError
from avocado_jax.remote.call import Malformed
from avocado_jax.remote.chat import Endpoint, Reply

VISUAL = [Sentence("A man in a red coat waves.", 0.0), Sentence("A bus drives past him.", 3.5)]
AUDIO = [Sentence('The man shouts, "Wait for me!"', 1.0)]
CAPTION = 'A man in a red coat waves. The man shouts, "Wait for me!" Then a bus drives past him.'
POINTS = [{"text": "A man waves.", "dimension": "dynamic"}, {"text": "A bus drives past.", "dimension": "dynamic"}]
LINES = [{"speaker": "the man", "text": "Wait for me!"}]
STAGES = {  # the true answer, its parser, the expected result
    "visual": (
        {"sentences": [one._asdict() for one in VISUAL]},
        partial(read_caption, seconds=5.0, least=1),
        VISUAL,
    ),
    "fusion": ({"caption": CAPTION}, partial(read_fused, visual=VISUAL, audio=AUDIO), CAPTION),
    "completeness": ({"score": 4}, read_score, 4),
    "keypoints": ({"keypoints": POINTS}, partial(read_keypoints, caption=CAPTION), POINTS),
    "dialogues": ({"dialogues": LINES}, partial(read_dialogues, caption=CAPTION), LINES),
}
WORDS = [
    "Here it is:",
    "```json",
    "```",
    "<think>{so}</think>",
    "{",
    "}",
    "好的,这是答案。",
    '{"note": 1}',
    "\x00",
    "\ud83d",
]


def mutated(rng, answer):
    """An answer with a corruption that is typical for models."""
    text = json.dumps(answer, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(8)
    if kind == 0:  # truncated
        return text[: rng.randrange(len(text))]
    if kind == 1:  # in prose
        return f"{rng.choice(WORDS)}\n{text}\n{rng.choice(WORDS)}"
    if kind == 2:  # with a wrong type
        (name,) = answer
        return json.dumps({name: rng.choice([None, True, 7, 4.5, "text", {}, [1], [[]], [{}], {"a": answer[name]}])})
    if kind == 3:  # with another name
        return json.dumps({f"{name}s": value for name, value in answer.items()})
    if kind == 4:  # huge
        return rng.choice(["[", "{", '{"a":', "9", "x "]) * 100_000
    if kind == 5:  # empty
        return rng.choice(["", " ", "{}", "[]", "null", "I cannot see the video.", "我看不到视频。"])
    if kind == 6:  # with entries that are wrong
        (name,) = answer
        entries = answer[name] if isinstance(answer[name], list) else [answer[name]]
        return json.dumps({name: [*entries, rng.choice([None, 1, {}, {"text": 1}, {"text": ""}, {"start": "0"}])]})
    index = rng.randrange(len(text))  # with a character of the syntax removed
    index = next((k for k in range(index, len(text)) if text[k] in '{}[]"'), 0)
    return text[:index] + text[index + 1 :]


@pytest.mark.parametrize("stage", STAGES)
def test_corrupted_answers_are_parsed_correctly_or_refused(stage):
    answer, read, meant = STAGES[stage]
    rng, right, refused = random.Random(stage), 0, 0
    assert read(json.dumps(answer)) == meant
    for _ in range(200):
        text = mutated(rng, answer)
        try:
            found = read(text)
        except Malformed as error:
            refused += len(str(error)) < 2_000
        else:
            assert found == meant, text
            right += 1
    assert right + refused == 200
    assert right > 15
    assert refused > 100


@given(st.text(max_size=60))
def test_parsers_accept_arbitrary_text(text):
    for _, read, _ in (*STAGES.values(), ({}, read_plain_caption, None)):
        for answer in (text, json.dumps({"caption": text, "sentences": [{"start": 1, "text": text}]})):
            try:
                read(answer)
            except Malformed:
                continue


@pytest.mark.parametrize("start", ["NaN", "Infinity", "-0.5", "6.5", "1e999"])
def test_time_outside_the_clip_is_refused(start):
    with pytest.raises(Malformed):
        read_caption('{"sentences": [{"start": START, "text": "A man."}]}'.replace("START", start), 5.0, 1)


def test_sentences_are_sorted_by_time():
    sentences = [{"start": 3, "text": "B\n b."}, {"start": 1.5, "text": " A. "}]
    assert read_caption(json.dumps({"sentences": sentences}), 5.0, 1) == [Sentence("A.", 1.5), Sentence("B b.", 3.0)]
    assert read_caption('{"sentences": []}', 5.0, 0) == []


def test_duplicate_keypoints_are_removed():
    twice = [*POINTS, {"text": "a man WAVES", "dimension": "static"}]
    assert read_keypoints(json.dumps({"keypoints": twice}), CAPTION) == POINTS


def test_dialogue_lines_must_occur_in_the_caption():
    def read(*lines):
        return read_dialogues(
            json.dumps({"dialogues": [{"speaker": " a  man ", "text": line} for line in lines]}), CAPTION
        )

    assert read('"wait FOR me"') == [{"speaker": "a man", "text": "wait FOR me"}]
    for wrong in (("Wait for us!",), ("Wait", "for", "Wait"), ("!",)):
        with pytest.raises(Malformed):
            read(*wrong)


def test_lone_surrogates_are_refused():
    with pytest.raises(Malformed):
        read_keypoints('{"keypoints": [{"text": "A man waves \\ud83d.", "dimension": "static"}]}', CAPTION)


def test_plain_captions_are_split_into_sentences():
    assert read_plain_caption('A man waves. He says, "Wait. Now!" He runs') == [
        Sentence("A man waves."),
        Sentence('He says, "Wait. Now!"'),
        Sentence("He runs"),
    ]
    for wrong in ("", " ... ", "and on " * 30):
        with pytest.raises(Malformed):
            read_plain_caption(wrong)


def test_frames_and_sound_round_trip_in_messages():
    rows, columns = np.mgrid[:84, :112]
    frame = np.stack([rows * 2, columns * 2, rows + columns], -1).astype(np.uint8)
    assert jpeg(frame) == jpeg(frame)
    assert np.abs(decoded(jpeg(frame)).astype(int) - frame).mean() < 3
    tone = np.sin(np.arange(16_000) / 20).astype(np.float32) * 1.5
    with wave.open(BytesIO(wav(tone, 16_000))) as file:
        assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (16_000, 16_000, 1)
        back = np.frombuffer(file.readframes(16_000), "<i2") / 32767
    np.testing.assert_allclose(back, np.clip(tone, -1, 1), atol=2e-5)


def test_quiet_sound_counts_as_silent():
    clip = Media(np.zeros((2, 28, 28, 3), np.uint8), None, 1.0)
    assert silent(clip)
    assert silent(clip._replace(samples=np.full(100, 1e-4, np.float32)))
    assert not silent(clip._replace(samples=np.array([0, 0.01, 0], np.float32)))


def test_call_rate_is_limited(tmp_path, monkeypatch):
    """On a fake clock: there is a pause between calls, for any number of concurrent callers."""
    clock, times = [100.0], []

    class Client:
        endpoint = Endpoint("http://host", "m")
        counts, tokens = Counter(), 0

        def now(self):
            return clock[0]

        async def ask(self, messages, read, options):
            times.append(clock[0])
            return Reply('{"score": 5}', '{"score": 5}')

    async def sleep(seconds):
        clock[0] += seconds

    async def content():
        return "text"

    async def ask_all(asker):
        for number in range(4):
            assert await asker.ask("clip", Question("completeness", number, content, Completeness, read_score)) == 5

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with open_journal(tmp_path / "answers.jsonl") as journal:
        asyncio.run(ask_all(Asker(Client(), journal, 2.0, 8)))
    assert times == [100.0, 102.0, 104.0, 106.0]


def test_journal_keeps_complete_answers_and_locks_the_folder(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with open_journal(path) as journal:
        journal.put("a", "clip", "visual", 1, "half \ud83d\r\n\u2028", 1, 10)
        journal.put("b", "clip", "audio", 1, "x" * 100_000, 2, 30)
        assert (journal.get("a"), journal.get("c")) == ("half \ud83d\r\n\u2028", None)
        with pytest.raises(InputError, match="another run"), open_journal(path):
            pass
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with open_journal(path) as journal:
        assert (journal.before, journal.get("b")) == ({"calls": 1, "tokens": 10}, None)
        journal.put("b", "clip", "audio", 1, "y", 2, 30)
    with open_journal(path) as journal:
        assert (journal.before, journal.get("b")) == ({"calls": 2, "tokens": 30}, "y")


def test_non_utf8_names_are_refused_before_any_call(tmp_path):
    (tmp_path / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"x")
    with pytest.raises(InputError, match="not UTF-8"):
        find_clips([tmp_path])
