"""Estimate the calls and tokens of a curation run, as the client counts them, without any request."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from avocado_jax.curation.asking import TRIES, prompt
from avocado_jax.curation.captions import Captioned
from avocado_jax.curation.content import text_part
from avocado_jax.curation.pipeline import BYTES, Settings
from avocado_jax.curation.run import Clip
from avocado_jax.data.decode import Probe
from avocado_jax.data.reader import ClipReader, available_cores
from avocado_jax.errors import InputError
from avocado_jax.progress import progress
from avocado_jax.remote.chat import AUDIO_BYTES, estimate

# Tokens of a typical answer (the longest captions of the paper have 1,437 on average), and the inputs of each stage.
ANSWERS = {
    "visual": 900,
    "audio": 450,
    "fusion": 1200,
    "completeness": 16,
    "keypoints": 1500,
    "dialogues": 200,
    "probes": 1600,
}
READS = {
    "fusion": ("visual", "audio"),
    "completeness": ("visual", "audio", "fusion"),
    "keypoints": ("fusion",),
    "dialogues": ("fusion",),
    "probes": ("fusion",),
}
OF_CLIPS = tuple(stage for stage in ANSWERS if stage != "probes")  # stages of `curate VIDEO...`
OF_SOUND = ("audio", "fusion", "completeness", "dialogues")  # stages that are skipped for a clip without sound
PICTURE = {"type": "image_url"}


def estimate_clips(clips: Sequence[Clip], settings: Settings, limit: int, local: bool) -> dict[str, int]:
    """Estimate calls and tokens: expected (every first answer is valid), and maximum.

    Args:
        limit: maximum tokens of an answer.
        local: a local model, not the endpoint, makes the visual and audio captions.
    """

    def look(clip: Clip) -> Probe | None:
        try:
            return reader.probe(clip.path, settings.reading)
        except InputError:
            return None

    workers = available_cores()
    total = Counter(clips=len(clips), unreadable=0, calls=0, tokens=0, calls_at_most=0, tokens_at_most=0)
    with ClipReader(workers) as reader, ThreadPoolExecutor(workers) as pool:
        for probe in progress(pool.map(look, clips), "curate: clips", len(clips)):
            if probe is None:
                total["unreadable"] += 1
                continue
            for stage in OF_CLIPS:
                if (local and stage in ("visual", "audio")) or (stage in OF_SOUND and not probe.sound):
                    continue
                _add(total, stage, probe, ANSWERS, dict.fromkeys(ANSWERS, settings.most), limit)
    return dict(total)


def estimate_references(
    captions: Sequence[Captioned], settings: Settings, limit: int, wanted: Sequence[str]
) -> dict[str, int]:
    """Estimate calls and tokens for the wanted references that captions lack; `limit` as in `estimate_clips`."""
    total = Counter(captions=len(captions), complete=0, calls=0, tokens=0, calls_at_most=0, tokens_at_most=0)
    for line in captions:
        total["complete"] += not line.missing(wanted)
        for stage in line.missing(wanted):
            length = {"fusion": settings.tokens(line.fields["caption"])}
            _add(total, stage, None, length, length, limit)
    return dict(total)


def _add(
    total: Counter[str],
    stage: str,
    probe: Probe | None,
    lengths: Mapping[str, int],
    longest: Mapping[str, int],
    limit: int,
) -> None:
    """Add a question: expected, one call with captions of `lengths`; maximum, `TRIES` calls with the longest ones."""
    total["calls"] += 1
    total["calls_at_most"] += TRIES
    total["tokens"] += _tokens(stage, probe, lengths, ANSWERS[stage])
    most = _tokens(stage, probe, longest, limit)
    total["tokens_at_most"] += TRIES * most + TRIES * (TRIES - 1) // 2 * limit  # invalid answers are sent back


def _tokens(stage: str, probe: Probe | None, lengths: Mapping[str, int], answer: int) -> int:
    """Tokens of one call, as the client estimates them. `probe`: of the clip, for stages with pictures or sound."""
    sound = 0
    if stage == "visual" and probe:
        parts: list[dict[str, Any]] = [text_part(" " * 32), *[text_part("0.00 s"), PICTURE] * probe.frames]
    else:
        parts = [text_part(" " * (BYTES * sum(lengths[name] for name in READS.get(stage, ())) + 32))]
    if stage == "audio" and probe:
        sound = int(probe.seconds * 16_000 * 2 * 4 / 3) // AUDIO_BYTES + 8
    messages = [{"role": "system", "content": prompt(stage)}, {"role": "user", "content": parts}]
    return estimate({"messages": messages, "max_tokens": answer}) + sound
