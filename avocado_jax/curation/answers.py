"""The schema of the model's answer at each stage, and the checks of its content."""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from avocado_jax.curation.fusion import fusion_faults
from avocado_jax.curation.words import Sentence, Words, words_of
from avocado_jax.data.probes import read_probe
from avocado_jax.errors import InputError
from avocado_jax.eval.metrics import collapses
from avocado_jax.remote.answers import read_object
from avocado_jax.remote.call import Malformed
from avocado_jax.world.check import split_sentences

LATE = 1.0  # seconds: tolerance for times past the end of the clip
LENGTH_FACTOR = 1.5  # limits the words of a fused caption, relative to its two source captions (plus a constant)
KEYPOINT_WORDS = 60  # maximum of a keypoint
GROUNDED = 0.6  # minimum share of the words of a keypoint or of a probe's answer that the caption contains
MOST_PROBES = 20  # maximum per caption
OTHERS = re.compile(  # choices that refer to other choices, so that their order matters
    r"\b(?:all|none|both|neither|any|either) of (?:the )?(?:above|below|others?|these|choices|options)\b"
    r"|^\W*[A-J]\W*(?:and|or)\W*[A-J]\W*$",
    re.I,
)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=20_000)]


class Faulty(Malformed):
    """A well-formed answer with invalid content. `stage`: the stage named in rejects.jsonl."""

    def __init__(self, what: str, stage: str = "") -> None:
        super().__init__(what)
        self.stage = stage


class TimedSentence(BaseModel):
    """A sentence and when what it tells of begins."""

    start: float = Field(allow_inf_nan=False)
    text: Text


class TimedCaption(BaseModel):
    """What is seen, or heard."""

    sentences: list[TimedSentence]


class FusedCaption(BaseModel):
    """Both in one."""

    caption: Text


class Completeness(BaseModel):
    """How much of both captions the fused one holds."""

    score: int = Field(ge=1, le=5)  # a Literal would accept `true` as 1


class Keypoint(BaseModel):
    """One atomic fact."""

    text: Text
    dimension: Literal["static", "dynamic", "auditory", "spatiotemporal", "crossmodal"]


class Keypoints(BaseModel):
    """All facts of a caption."""

    keypoints: list[Keypoint]


class Line(BaseModel):
    """One line of dialogue."""

    speaker: Text
    text: Text


class Dialogues(BaseModel):
    """All lines of a caption."""

    dialogues: list[Line]


class ProbeAnswer(BaseModel):
    """One question with its choices."""

    question: Text
    choices: list[Text]
    answer: Text
    category: Literal["static", "dynamic", "auditory", "spatiotemporal", "crossmodal"]


class Probes(BaseModel):
    """Questions about a caption."""

    probes: list[ProbeAnswer]


def read_caption(text: str, seconds: float, least: int) -> list[Sentence]:
    """Return the sentences of a visual or audio caption, sorted by time.

    Raises:
        Malformed: invalid, fewer sentences than `least`, repetition, or a time outside the clip.
    """
    sentences = read_object(text, TimedCaption).sentences
    if len(sentences) < least:
        raise Faulty("there is no sentence in it")
    if wrong := [sentence for sentence in sentences if not 0 <= sentence.start <= seconds + LATE]:
        raise Faulty(f"{wrong[0].start:g} s is not within the {seconds:.1f} s of the clip: «{wrong[0].text[:200]}»")
    made = [Sentence(" ".join(sentence.text.split()), sentence.start) for sentence in sentences]
    if collapses("\n".join(sentence.text for sentence in made)):
        raise Faulty("the caption repeats itself over and over", "repetition")
    return sorted(made, key=lambda sentence: sentence.start)


def read_plain_caption(text: str) -> list[Sentence]:
    """Return the sentences of a plain-text caption in order, without times.

    Raises:
        Malformed: no sentences, or repetition.
    """
    if collapses(text):
        raise Faulty("the caption repeats itself over and over", "repetition")
    sentences = [Sentence(sentence) for sentence in split_sentences(text) if words_of(sentence)]
    if not sentences:
        raise Faulty("there is no sentence in it")
    return sentences


def read_fused(text: str, visual: Sequence[Sentence], audio: Sequence[Sentence]) -> str:
    """Return the fused caption; it must contain every sentence of the two captions.

    Raises:
        Malformed: invalid, or lists the sentences that are missing, changed or misplaced.
    """
    caption = read_object(text, FusedCaption).caption
    if collapses(caption):
        raise Faulty("the fused caption repeats itself over and over", "repetition")
    most = LENGTH_FACTOR * sum(len(words_of(sentence.text)) for sentence in (*visual, *audio)) + 50
    if (count := len(words_of(caption))) > most:
        raise Faulty(f"the fused caption has {count} words, the two captions allow {most:.0f}")
    if faults := fusion_faults(caption, visual, audio).message():
        raise Faulty(faults)
    return caption


def read_score(text: str) -> int:
    """Return the completeness score of a fused caption, 1 to 5. Raises Malformed if the answer has no score."""
    return read_object(text, Completeness).score


def read_keypoints(text: str, caption: str) -> list[dict[str, str]]:
    """Return the keypoints of a caption without duplicates.

    Raises:
        Malformed: no keypoints, or a keypoint is not atomic or not in the caption.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    known = set(words_of(caption))
    for keypoint in read_object(text, Keypoints).keypoints:
        point = " ".join(keypoint.text.split())
        words = words_of(point)
        if len(list(split_sentences(point))) != 1 or not 0 < len(words) <= KEYPOINT_WORDS:
            raise Faulty(f"a keypoint that is not one short statement: «{point[:200]}»")
        if sum(word in known for word in words) < GROUNDED * len(words):
            raise Faulty(f"a keypoint that the caption does not state: «{point[:200]}»")
        found.setdefault(tuple(words), {"text": point, "dimension": keypoint.dimension})
    if not found:
        raise Faulty("there is no keypoint in it")
    return list(found.values())


def read_dialogues(text: str, caption: str) -> list[dict[str, str]]:
    """Return the lines of dialogue of a caption in order, with their speakers.

    Raises:
        Malformed: invalid, or a line is not in the caption or out of order.
    """
    lines, words, position = [], Words(caption), -1
    for entry in read_object(text, Dialogues).dialogues:
        line = " ".join(entry.text.split()).strip('"“”')
        places = words.places(words_of(line))
        if not places:
            raise Faulty(f"a line that the caption does not hold in these words: «{line[:200]}»")
        if (position := next((later for later in places if later > position), None)) is None:
            raise Faulty(f"a line that stands earlier in the caption than the line before it: «{line[:200]}»")
        lines.append({"speaker": " ".join(entry.speaker.split()), "text": line})
    return lines


def read_probes(text: str, caption: str) -> list[dict[str, Any]]:
    """Return up to MOST_PROBES probes of a caption, without duplicate questions.

    Models tend to list the correct answer first, so the choices are reordered by a hash of their text.

    Raises:
        Malformed: no probes, or a probe whose choices are invalid or refer to each other, or whose answer the caption
            does not state.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    known = set(words_of(caption))
    for entry in read_object(text, Probes).probes:
        fields = {
            "question": " ".join(entry.question.split()),
            "choices": [" ".join(part.split()) for part in entry.choices],
        }
        fields |= {"answer": " ".join(entry.answer.split()), "category": entry.category}
        try:
            probe = read_probe(fields)
        except InputError as error:
            raise Faulty(f"{error}: «{fields['question'][:200]}»") from None
        right = probe.choices[probe.right]
        if refers := [part for part in probe.choices if OTHERS.search(part)]:
            raise Faulty(f"a choice that refers to others, «{refers[0][:100]}»: «{probe.question[:200]}»")
        if len({tuple(words_of(part)) for part in probe.choices}) < len(probe.choices):
            raise Faulty(f"two choices in the same words: «{probe.question[:200]}»")
        words = words_of(right)
        if not words or sum(word in known for word in words) < GROUNDED * len(words):
            raise Faulty(f"an answer that the caption does not state, «{right[:100]}»: «{probe.question[:200]}»")
        choices = sorted(probe.choices, key=lambda part: hashlib.sha256(f"{probe.question}|{part}".encode()).digest())
        fields |= {"choices": choices, "answer": right}
        found.setdefault(tuple(words_of(probe.question)), fields)
    if not found:
        raise Faulty("there is no question in it")
    return list(found.values())[:MOST_PROBES]
