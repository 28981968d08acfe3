"""Visual and audio captions by a local thinker instead of an endpoint."""

import asyncio
import threading
from collections.abc import Callable

import numpy as np

from avocado_jax.curation.answers import Faulty, read_plain_caption
from avocado_jax.curation.asking import Rejected, Unanswered, digest, prompt
from avocado_jax.curation.content import silent
from avocado_jax.curation.journal import Journal
from avocado_jax.curation.pipeline import Captions, Source
from avocado_jax.curation.words import Sentence
from avocado_jax.data.media import Media
from avocado_jax.errors import first_line
from avocado_jax.eval.runner import FAILURES
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.engine import Engine

GREY = 128


def local_captions(load: Callable[[], Captioner], identity: str, length: int, journal: Journal) -> Captions:
    """Visual and audio captions by a model, which is loaded on first use. They are stored in the journal.

    Args:
        identity: identifies the checkpoint and its compute dtype.
        length: maximum tokens of a caption.
    """
    lock, loaded = threading.Lock(), []

    def write(media: Media, stage: str) -> str:
        if stage == "local_visual":
            media = media._replace(samples=None)
        else:  # the audio caption must not depend on the picture
            media = media._replace(frames=np.full_like(media.frames, GREY))
        with lock:  # the model captions one clip at a time
            if not loaded:
                loaded.append(load())
            captioner = loaded[0]
            try:
                row = captioner.row(media, {"prompt": prompt(stage)})
                ((_, tokens),) = Engine(captioner, length, slots=1).run([(None, row, 0)])
                if isinstance(tokens, Exception):
                    raise tokens
            except FAILURES as error:  # this clip fails; the others continue
                raise Unanswered(stage.removeprefix("local_"), first_line(error)) from error
        return words(captioner, tokens)

    async def caption(source: Source, known: str, stage: str) -> list[Sentence]:
        key = digest([prompt(stage), identity, length, known, repr(source.reading)])
        text = journal.get(key)
        if text is None:
            media = await source.media()
            if stage == "local_audio" and silent(media):
                return []
            text = await asyncio.to_thread(write, media, stage)
            journal.put(key, source.name, stage, 1, text, **journal.spent)
        try:
            return read_plain_caption(text)
        except Faulty as fault:
            raise Rejected(fault.stage or stage.removeprefix("local_"), str(fault)) from fault

    async def captions(source: Source) -> tuple[list[Sentence], list[Sentence]]:
        probe, known = await source.probe(), await source.digest()
        visual = await caption(source, known, "local_visual")
        return visual, await caption(source, known, "local_audio") if probe.sound else []

    return captions
