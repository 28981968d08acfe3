"""Sound: distinct effects and voices at the right time, equal in any process."""

import hashlib
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from avocado_jax.errors import InputError
from avocado_jax.world.director import make_script, speech_seconds
from avocado_jax.world.sound import BED_LEVEL, bed, effect, mix
from avocado_jax.world.vocabulary import BEDS, EFFECTS, NARRATOR, VOICES
from avocado_jax.world.voice import ESPEAK, RATE, speak

LINES = (
    "Look at the moon.",
    "Did you hear the garden?",
    "Nobody knows about the window. I left my king at home.",
)


def spectrum(wave):
    """Energy in decibels in 32 logarithmic bands and 8 intervals of time."""
    edges = np.geomspace(50, 7900, 33)
    rows = []
    for piece in np.array_split(wave, 8):
        power = np.abs(np.fft.rfft(piece)) ** 2
        frequency = np.fft.rfftfreq(len(piece), 1 / RATE)
        rows.append([power[(frequency >= a) & (frequency < b)].sum() for a, b in pairwise(edges)])
    energy = np.log10(np.array(rows) + 1e-4 * np.max(rows))
    return (energy - energy.mean()).ravel() / np.linalg.norm(energy - energy.mean())


def closest_pair(waves):
    spectra = [spectrum(wave) for wave in waves]
    return max(float(a @ b) for i, a in enumerate(spectra) for b in spectra[:i])


def test_effects_are_distinct_and_have_their_length():
    waves = [effect(name) for name in EFFECTS]
    assert closest_pair(waves) < 0.8
    for name, wave in zip(EFFECTS, waves, strict=True):
        assert len(wave) == round(EFFECTS[name] * RATE)
        assert np.abs(wave).max() == pytest.approx(1)


def test_background_sounds_are_distinct_and_even():
    waves = [bed(name, 6.0) for name in BEDS]
    assert closest_pair(waves) < 0.8
    for wave in waves:
        assert wave.dtype == np.float32
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(1, rel=1e-3)


def test_voices_are_distinct():
    assert set(ESPEAK) == {*VOICES, NARRATOR}
    waves = [speak(LINES[0], voice, 1.1).samples for voice in ESPEAK]
    assert closest_pair(waves) < 0.95


@pytest.mark.parametrize("voice", ESPEAK)
def test_speech_has_the_length_of_the_script(voice):
    for line in LINES:
        seconds = speech_seconds(line, voice)
        speech = speak(line, voice, seconds)
        assert len(speech.samples) == round(seconds * RATE)
        assert [word for word, *_ in speech.words] == [w.strip(".?") for w in line.split()]
        starts = [start for _, start, _ in speech.words]
        assert starts == sorted(starts)
        assert starts[0] < 0.1
        assert all(a < b <= seconds for _, a, b in speech.words)


def digests(lines):
    return [hashlib.sha256(speak.__wrapped__(line, v, 1.5).samples.tobytes()).hexdigest() for line, v in lines]


def test_speech_does_not_depend_on_earlier_lines():
    spoken = [(line, voice) for line in LINES for voice in ESPEAK]
    first = digests(spoken)
    assert digests(spoken[::-1])[::-1] == first
    code = (
        "import sys, hashlib; from avocado_jax.world.voice import speak\n"
        f"print([hashlib.sha256(speak(l, v, 1.5).samples.tobytes()).hexdigest() for l, v in {spoken[::2]!r}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(first[::2])


def test_missing_espeak_is_named_in_the_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match=r"pip install 'avocado-jax\[world\]'"):
        speak.__wrapped__("Hello.", "deep", 1.0)


def test_mix_has_the_times_and_levels_of_the_script():
    for index in range(12):
        script = make_script(7, index, "train", 1)
        track = mix(script)
        assert track.dtype == np.float32
        assert len(track) == script.duration * RATE
        assert np.abs(track).max() <= 0.99
        parts = [part for event in script.events for part in event.parts or (event,)]
        music = next((BED_LEVEL[p.get("loudness")] for p in parts if p.kind == "bed"), 0.0)

        def sound_level(start, end, track=track):
            return np.sqrt(np.mean(track[round(start * RATE) : round(end * RATE)] ** 2))

        for part in parts:
            if part.kind == "effect":
                peak = np.abs(track[round(part.start * RATE) : round(part.end * RATE)]).max()
                assert (peak > 0.42) == (part.get("loudness") == "loud")
            if part.kind == "say":
                assert sound_level(part.start, part.end) > 1.2 * music
                assert sound_level(part.start - 0.15, part.start) < sound_level(part.start, part.end)
