"""Synthesize the sound of a script: effects, background music and speech, mixed to mono."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from avocado_jax.world.script import Event, Script
from avocado_jax.world.vocabulary import EFFECTS, NARRATOR
from avocado_jax.world.voice import RATE, speak

EFFECT_PEAK = {"": 0.4, "soft": 0.15, "loud": 0.6}  # by loudness
BED_LEVEL = {"": 0.03, "soft": 0.015, "loud": 0.05}  # root mean square
SPEECH_LEVEL = 0.12


def mix(script: Script) -> np.ndarray:
    """The sound of a clip, float32 [duration * RATE], -1..1."""
    track = np.zeros(round(script.duration * RATE), np.float32)
    for event in script.events:
        for part in event.parts or (event,):
            sound = _sound(part, script)
            if sound is not None:
                begin = round(part.start * RATE)
                stretch = track[begin : begin + len(sound)]
                stretch += sound[: len(stretch)]
    return np.clip(track, -0.99, 0.99, out=track)


def _sound(event: Event, script: Script) -> np.ndarray | None:
    if event.kind == "effect":
        return effect(event.get("effect")) * np.float32(EFFECT_PEAK[event.get("loudness")])
    if event.kind == "bed":
        music = bed(event.get("bed"), event.end - event.start)
        return music * np.float32(BED_LEVEL[event.get("loudness")])
    if event.kind == "say":
        voice = script.actors[event.actor].voice if event.actor >= 0 else NARRATOR
        samples = speak(event.get("line"), voice, round(event.end - event.start, 2)).samples
        level = SPEECH_LEVEL / np.sqrt(np.mean(samples**2))
        return samples * np.float32(min(level, 0.85 / np.abs(samples).max()))
    return None


@lru_cache(maxsize=len(EFFECTS))
def effect(name: str) -> np.ndarray:
    """A sound effect, float32 [EFFECTS[name] * RATE], with peak 1."""
    seconds = EFFECTS[name]
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(7).standard_normal(len(t))
    match name:
        case "bell":
            partials = ((880, 1.0, 3), (1760, 0.6, 4), (2431, 0.5, 6), (4752, 0.25, 9))
            wave = sum(a * np.sin(2 * np.pi * f * t) * np.exp(-d * t) for f, a, d in partials)
        case "drum":
            wave = _hits(t, (0.0, 0.25, 0.5), lambda u: np.sin(2 * np.pi * (70 * u - 6 * np.exp(-20 * u))), 9)
            wave += 0.15 * _hits(t, (0.0, 0.25, 0.5), lambda u: noise[: len(u)], 60)
        case "whistle":
            wave = np.sin(2 * np.pi * 2400 * t + 4 * np.sin(2 * np.pi * 14 * t)) * (1 + 0.02 * noise)
        case "buzzer":
            wave = np.sign(np.sin(2 * np.pi * 130 * t)) * 0.7 + 0.3 * np.sign(np.sin(2 * np.pi * 195 * t))
        case "siren":
            wave = np.sin(2 * np.pi * np.cumsum(900 - 350 * np.cos(2 * np.pi * 1.67 * t)) / RATE)
        case "bird":
            wave = _hits(t, (0.0, 0.18, 0.36, 0.6), lambda u: np.sin(2 * np.pi * (3200 * u + 9000 * u * u)), 14)
        case "clap":
            wave = _hits(t, (0.0, 0.2, 0.4, 0.6), lambda u: band(noise, 900, 5000)[: len(u)], 45)
        case "horn":
            wave = sum(np.sin(2 * np.pi * f * k * t) / k for f in (311, 392) for k in range(1, 8)) * np.minimum(
                1, 40 * np.minimum(t, seconds - t)
            )
        case "knock":
            wave = _hits(t, (0.0, 0.22, 0.44), lambda u: np.sin(2 * np.pi * 320 * u) + np.sin(2 * np.pi * 710 * u), 40)
        case "harp":
            scale = 262 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16, 19, 21]) / 12)
            wave = sum(_hits(t, (0.07 * k,), lambda u, f=f: _pluck(u, f), 5) for k, f in enumerate(scale))
        case "wind":
            wave = band(noise, 250, 1400) * np.sin(np.pi * np.sqrt(t / seconds)) ** 1.5
        case "laser":
            wave = np.sin(2 * np.pi * np.cumsum(300 + 3700 * np.exp(-7 * t)) / RATE) * np.exp(-3 * t)
    wave = wave * np.minimum(1, 200 * (seconds - t))  # no click at the end
    wave = (wave / np.abs(wave).max()).astype(np.float32)
    wave.setflags(write=False)
    return wave


def bed(name: str, seconds: float) -> np.ndarray:
    """Background music, float32 [seconds * RATE], with RMS 1, faded in and out."""
    t = np.arange(round(seconds * RATE)) / RATE
    beat = {"piano": 0.5, "synth": 0.2, "music box": 0.3}.get(name, 1.0)
    onsets = np.arange(0, seconds, beat)
    match name:
        case "piano":
            wave = _tune(t, onsets, 196, (0, 4, 7, 12, 9, 7, 4, 2), lambda u, f: _pluck(u, f), 2.5)
        case "synth":
            wave = _tune(
                t,
                onsets,
                392,
                (0, 7, 12, 7, 4, 7, 12, 16),
                lambda u, f: np.tanh(4 * np.sin(2 * np.pi * f * u)),
                7,
            )
        case "drone":
            wave = sum(np.sin(2 * np.pi * f * t) for f in (55, 55.7, 82.5, 110.4, 165.3, 220.8, 331))
            wave *= 1 + 0.3 * np.sin(2 * np.pi * 0.4 * t)
        case "strings":
            chord = [(262, 330, 392), (220, 262, 330), (175, 220, 262), (196, 247, 294)]
            which = (t // 2).astype(int) % 4
            swell = 0.55 - 0.45 * np.cos(np.pi * t)
            wave = np.zeros_like(t)
            for k, notes in enumerate(chord):
                u = t[which == k]
                tone = [
                    np.sin(2 * np.pi * f * h * u + 0.4 * np.sin(2 * np.pi * 5.5 * u)) / h
                    for f in notes
                    for h in (1, 2, 3)
                ]
                wave[which == k] = sum(tone)
            wave *= swell
        case "beat":
            half = np.arange(0, seconds, 0.5)
            noise = np.random.default_rng(11).standard_normal(RATE)
            wave = _hits(t, half, lambda u: np.sin(2 * np.pi * (50 * u - 4 * np.exp(-25 * u))), 12)
            wave += 0.4 * _hits(t, half + 0.25, lambda u: band(noise, 5000, 7800)[: len(u)], 30)
        case "music box":
            wave = _tune(t, onsets, 1047, (12, 7, 9, 4, 7, 2, 4, 0), lambda u, f: np.sin(2 * np.pi * f * u), 6)
    wave *= np.minimum(1, 5 * np.minimum(t, seconds - t).clip(0))
    return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def band(noise: np.ndarray, low: float, high: float) -> np.ndarray:
    """Band-pass filter a signal [S] between two frequencies in Hz and normalize it to RMS 1."""
    spectrum = np.fft.rfft(noise)
    frequency = np.fft.rfftfreq(len(noise), 1 / RATE)
    kept = np.fft.irfft(spectrum * ((frequency > low) & (frequency < high)), len(noise))
    return kept / np.sqrt(np.mean(kept**2))


def _hits(t: np.ndarray, onsets: Iterable[float], tone: Callable, decay: float) -> np.ndarray:
    """A tone (a function of the seconds since its onset) at each onset, with exponential decay."""
    wave = np.zeros_like(t)
    length = min(len(t), RATE, round(8 / decay * RATE))  # e^-8 is inaudible
    u = np.arange(length) / RATE
    note = tone(u) * np.exp(-decay * u)
    for onset in onsets:
        begin = round(onset * RATE)
        stretch = wave[begin : begin + length]
        stretch += note[: len(stretch)]
    return wave


def _pluck(u: np.ndarray, f: float) -> np.ndarray:
    return sum(np.sin(2 * np.pi * f * k * u) * np.exp(-3 * k * u) / k for k in (1, 2, 3, 4))


def _tune(
    t: np.ndarray, onsets: np.ndarray, root: float, steps: Sequence[int], tone: Callable, decay: float
) -> np.ndarray:
    """A repeated sequence of notes (semitones above `root` Hz), one per onset."""
    pitches = [root * 2 ** (step / 12) for step in steps]
    return sum(_hits(t, onsets[k :: len(steps)], lambda u, f=f: tone(u, f), decay) for k, f in enumerate(pitches))
