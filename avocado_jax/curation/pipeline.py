"""All stages of one clip: visual and audio captions, fusion, filters, completeness, references (paper, Figure 1)."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from avocado_jax.curation.answers import (
    Completeness,
    Dialogues,
    FusedCaption,
    Keypoints,
    Probes,
    TimedCaption,
    read_caption,
    read_dialogues,
    read_fused,
    read_keypoints,
    read_probes,
    read_score,
)
from avocado_jax.curation.asking import Asker, Question, Rejected
from avocado_jax.curation.content import Parts, picture_parts, silent, sound_parts
from avocado_jax.curation.words import Sentence, as_text
from avocado_jax.data.container import printable
from avocado_jax.data.decode import Probe
from avocado_jax.data.media import Media, Reading, reading_fields
from avocado_jax.data.reader import ClipReader
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError

T = TypeVar("T")
COMPLETE = 4  # minimum completeness score, of 5
BYTES = 3  # bytes of text per token, without a tokenizer


@dataclass(frozen=True)
class Settings:
    """How clips are decoded, and the length limits of captions."""

    reading: Reading
    fewest: int  # minimum tokens of a caption
    most: int  # maximum
    tokenizer: Words | None = None

    def tokens(self, text: str) -> int:
        """The length of a text in tokens."""
        return len(self.tokenizer.encode(text)) if self.tokenizer else len(text.encode()) // BYTES


# Makes the visual and audio captions of a clip with a local model instead of the endpoint.
Captions = Callable[["Source"], Awaitable[tuple[list[Sentence], list[Sentence]]]]


class Source:
    """A clip file, decoded once, when its content is first needed. All methods raise Rejected for a damaged file."""

    def __init__(self, name: str, path: Path, reading: Reading, reader: ClipReader) -> None:
        self.name, self.path, self.reading, self._reader = name, path, reading, reader
        self._media: asyncio.Task[Media] | None = None

    async def probe(self) -> Probe:
        """The metadata of the file."""
        probe = await self._read(self._reader.probe, self.path, self.reading)
        if probe.sound and probe.seconds > self.reading.sound_seconds:
            limit = f"the limit of clips with sound is {self.reading.sound_seconds} s"
            raise Rejected("read", f"{probe.seconds:.0f} s long; {limit}")
        return probe

    async def digest(self) -> str:
        """The SHA-256 of the file."""

        def file_digest() -> str:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return await self._read(file_digest)

    async def media(self) -> Media:
        """The decoded clip."""
        if self._media is None:
            self._media = asyncio.create_task(self._read(self._reader.read, self.path, self.reading))
        return await self._media

    async def pictures(self) -> Parts:
        """The frames as content parts."""
        return await asyncio.to_thread(picture_parts, await self.media())

    async def sound(self) -> Parts:
        """The sound as content parts."""
        return await asyncio.to_thread(sound_parts, await self.media(), self.reading)

    def forget(self) -> None:
        """Release the decoded clip."""
        self._media = None

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.to_thread(call, *args)
        except InputError as error:
            raise Rejected("read", str(error).removeprefix(f"{printable(self.path)}: ")) from error
        except OSError as error:
            raise Rejected("read", error.strerror or str(error)) from error


async def curate_clip(asker: Asker, source: Source, settings: Settings, local: Captions | None) -> dict[str, Any]:
    """Make the caption, keypoints and dialogues of a clip: its manifest line without "id" and "video".

    Raises:
        Rejected: the clip is not used for training.
        Unanswered, Stopped: as `Asker.ask`.
    """
    visual, audio = await (local(source) if local else visual_and_audio(asker, source))
    source.forget()
    check_length(settings, as_text([*visual, *audio]), "the visual and the audio caption", most_only=True)
    caption = await fuse(asker, source.name, visual, audio) if audio else as_text(visual)
    check_length(settings, caption, "the fused caption")
    if audio:  # without audio nothing was fused
        captions = caption_fields(visual, audio) | {"fused": caption}
        score = await asker.ask(source.name, question("completeness", captions, Completeness, read_score))
        if score < COMPLETE:
            raise Rejected("completeness", f"completeness {score} of 5, the minimum is {COMPLETE}")
    keypoints = await keypoints_of(asker, source.name, caption)
    dialogues = await dialogues_of(asker, source.name, caption) if audio else []
    return {"caption": caption, "dialogues": dialogues, "keypoints": keypoints}


async def visual_and_audio(asker: Asker, source: Source) -> tuple[list[Sentence], list[Sentence]]:
    """Get the visual and audio captions from the endpoint; the audio caption of a silent clip is empty."""
    probe, known = await source.probe(), await source.digest()
    about = [known, reading_fields(replace(source.reading, align_sound=False))]
    read = partial(read_caption, seconds=probe.seconds)
    visual = Question("visual", about, source.pictures, TimedCaption, partial(read, least=1))
    audio = Question("audio", about, source.sound, TimedCaption, partial(read, least=0))
    visual_sentences = await asker.ask(source.name, visual)
    if not probe.sound or (not asker.knows(audio) and silent(await source.media())):
        return visual_sentences, []
    return visual_sentences, await asker.ask(source.name, audio)


async def fuse(asker: Asker, name: str, visual: Sequence[Sentence], audio: Sequence[Sentence]) -> str:
    """Merge the two captions in chronological order, with every sentence of both."""
    read = partial(read_fused, visual=visual, audio=audio)
    return await asker.ask(name, question("fusion", caption_fields(visual, audio), FusedCaption, read))


async def keypoints_of(asker: Asker, name: str, caption: str) -> list[dict[str, str]]:
    """The atomic facts of a caption, without duplicates. Raises as `Asker.ask`."""
    read = partial(read_keypoints, caption=caption)
    return await asker.ask(name, question("keypoints", {"caption": caption}, Keypoints, read))


async def dialogues_of(asker: Asker, name: str, caption: str) -> list[dict[str, str]]:
    """The lines of dialogue of a caption, as quoted there. Raises as `Asker.ask`."""
    read = partial(read_dialogues, caption=caption)
    return await asker.ask(name, question("dialogues", {"caption": caption}, Dialogues, read))


async def probes_of(asker: Asker, name: str, caption: str) -> list[dict[str, Any]]:
    """Multiple-choice questions that the caption answers. Raises as `Asker.ask`."""
    read = partial(read_probes, caption=caption)
    return await asker.ask(name, question("probes", {"caption": caption}, Probes, read))


def caption_fields(visual: Sequence[Sentence], audio: Sequence[Sentence]) -> dict[str, Any]:
    """The two captions as fields of a question."""

    def entries(sentences: Sequence[Sentence]) -> list[dict[str, Any]]:
        return [{"text": text} | ({} if start is None else {"start": start}) for text, start in sentences]

    return {"visual": entries(visual), "audio": entries(audio)}


def question(stage: str, texts: dict[str, Any], schema: Any, read: Callable[[str], Any]) -> Question:
    """A question about texts. They are sent as JSON, so that their content cannot be mistaken for instructions."""

    async def content() -> str:
        return json.dumps(texts, ensure_ascii=False, indent=1)

    return Question(stage, texts, content, schema, read)


def check_length(settings: Settings, text: str, what: str, most_only: bool = False) -> None:
    """Raise Rejected if a text is too long or too short."""
    length = settings.tokens(text)
    if length > settings.most:
        raise Rejected("length", f"{what} has {length} tokens, the maximum is {settings.most}")
    if length < settings.fewest and not most_only:
        raise Rejected("length", f"{what} has {length} tokens, the minimum is {settings.fewest}")
