"""Probes: user-defined multiple-choice questions. A judge answers all questions of a caption in one call."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from avocado_jax.data.manifest import prompt_fields
from avocado_jax.data.probes import read_probe
from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Answer, Ask, Benchmark, Record, Unit, all_different
from avocado_jax.eval.benchmarks.choices import OFFICIAL, measure
from avocado_jax.jsonl import read_lines
from avocado_jax.remote.answers import objects, read_object
from avocado_jax.remote.call import Malformed
from avocado_jax.rewards.probes import CHOICE_LABELS, UNKNOWN, by_letter, letter_of
from avocado_jax.typing import Probe


class Choice(Answer):
    """The answer to one question."""

    number: int
    answer: str


class Choices(Answer):
    """The answers to all questions."""

    answers: list[Choice]


def read(path: Path) -> list[Record]:
    """Read lines {"id", "probes": [{"question", "choices", "answer", "category"?}], "video"?, "prompt"?, ...}."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for where, line in read_lines(path, {"id": str, "probes": list}):
        try:
            probes = [read_probe(probe) for probe in line["probes"]]
            prompt = prompt_fields(line).get("prompt")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if not probes:
            raise InputError(f'{where}: "probes" is empty')
        caption, video = line.get("caption"), line.get("video", line["id"])
        if not isinstance(video, str):
            raise InputError(f'{where}: "video" must be a string')
        yield Record(line["id"], (video,), prompt or None, caption if isinstance(caption, str) else None, probes)


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """One unit per question, as `choices.judge`. The type is the category. All answers of an empty caption are N/A."""
    probes: Sequence[Probe] = record.truth
    units = [
        {
            "question": probe.question,
            "choices": by_letter(probe),
            "truth": CHOICE_LABELS[probe.right],
            "type": probe.category or "none",
        }
        for probe in probes
    ]
    if not caption.strip():
        return [unit | {"answer": UNKNOWN} for unit in units]
    questions = {
        str(number): {"question": probe.question, "choices": by_letter(probe)}
        for number, probe in enumerate(probes, start=1)
    }

    def read_choices(text: str) -> dict[int, str]:
        try:
            answers = read_object(text, Choices, python=True).answers
            by_number = {answer.number: answer.answer for answer in answers}
            if len(by_number) < len(answers):
                by_number = {}  # duplicate numbers: reject the answer
        except Malformed:  # also accept {"1": "A", ...}
            last = next(reversed(objects(text, python=True)), {})
            by_number = {int(name): str(answer) for name, answer in last.items() if name.isdecimal() and len(name) < 6}
        found = {
            number: letter
            for number, answer in by_number.items()
            if 0 < number <= len(probes) and (letter := letter_of(answer, by_letter(probes[number - 1])))
        }
        if not found or not by_number.keys() <= set(range(1, len(probes) + 1)):
            raise Malformed(f"{len(probes)} questions were asked, the answer has {list(by_number)[:50]}", text)
        return found

    reply = await ask("probes", {"caption": caption, "questions": questions}, Choices, read=read_choices)
    if reply.value is None:
        return [unit | {"why": reply.why} for unit in units]
    chosen: Mapping[int, str] = reply.value
    return [
        unit | ({"answer": chosen[number]} if number in chosen else {"why": "left out of the answer"})
        for number, unit in enumerate(units, start=1)
    ]


BENCHMARK = Benchmark("probes", "Probes", ("probes",), read, judge, measure, "accuracy", official=OFFICIAL, beside=True)
