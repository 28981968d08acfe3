"""Synthesize lines of dialogue with the espeak-ng library and voices installed by `espeakng-loader`."""

import _ctypes
import ctypes
import re
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from avocado_jax.errors import InputError
from avocado_jax.world.vocabulary import NARRATOR

RATE = 16000  # sample rate of all sound of AVWorld, in Hz
WORDS_PER_MINUTE = 160

ESPEAK = {  # voice -> espeak variant and pitch (0 to 99)
    "deep": ("en-us+m7", 12),
    "high": ("en-us+f4", 85),
    "hoarse": ("en-us+croak", 45),
    "whispering": ("en-us+whisper", 50),
    "robotic": ("en-us+klatt2", 35),
    NARRATOR: ("en-gb-x-rp+m3", 55),
}


class Speech(NamedTuple):
    """Speech: `samples` float32 [S], -1..1, at `RATE`; (word, start, end) of each word in seconds."""

    samples: np.ndarray
    words: tuple[tuple[str, float, float], ...]


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))
_RETRIEVAL, _DONT_EXIT, _UTF8, _CHARACTER, _RATE, _PITCH, _WORD = 1, 0x8000, 1, 1, 1, 3, 1  # speak_lib.h
_ONE_LINE = threading.Lock()  # threads share the loaded library and its state


@lru_cache(maxsize=1024)
def speak(line: str, voice: str, seconds: float) -> Speech:
    """Speak a line in a voice (a key of `ESPEAK`), with a duration of exactly `seconds`.

    A pure function: the samples depend on the arguments only, not on the process or earlier lines.

    Raises:
      InputError: `espeakng-loader` is not installed.
    """
    # espeak's speed setting nearly reaches the duration; the remaining stretch is too small to change the voice.
    pcm, *_ = _trimmed(line, voice, WORDS_PER_MINUTE)
    speed = WORDS_PER_MINUTE * len(pcm) / (22050 * seconds)
    pcm, lead, starts = _trimmed(line, voice, round(min(max(speed, 90), 380)))
    samples = resample(pcm, round(seconds * RATE))
    words = re.findall(r"[\w']+", line)
    times = [min(max(start - lead, 0) / len(pcm) * seconds, seconds) for start in starts[: len(words)]]
    ends = [*times[1:], seconds]
    timed = tuple((w, round(s, 3), round(e, 3)) for w, s, e in zip(words, times, ends, strict=False))
    samples.setflags(write=False)  # it is cached
    return Speech(samples, timed)


def resample(signal: np.ndarray, length: int) -> np.ndarray:
    """Resample a signal [S] to `length` samples over the same time, band-limited, float32."""
    spectrum = np.fft.rfft(signal)
    return np.fft.irfft(spectrum, length).astype(np.float32) * np.float32(length / len(signal))


def _trimmed(line: str, voice: str, speed: int) -> tuple[np.ndarray, int, list[int]]:
    """The output of espeak without leading and trailing silence, the samples removed in front, and word starts."""
    pcm, starts = _synthesise(line, *ESPEAK[voice], speed)
    loud = np.flatnonzero(np.abs(pcm) > 0.02 * np.abs(pcm).max())
    begin, stop = max(loud[0] - 110, 0), loud[-1] + 441
    return pcm[begin:stop], int(begin), starts


def _synthesise(line: str, variant: str, pitch: int, speed: int) -> tuple[np.ndarray, list[int]]:
    """The output of espeak, float [S] at 22,050 Hz, and the sample at which each word starts."""
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("speech needs espeakng-loader: pip install 'avocado-jax[world]'") from None
    chunks, starts = [], []

    @_Callback
    def receive(wav: int | None, count: int, events) -> int:
        if wav and count > 0:
            chunks.append(ctypes.string_at(wav, 2 * count))
        k = 0
        while events[k].type:
            if events[k].type == _WORD:
                starts.append(events[k].audio_position * 22050 // 1000)
            k += 1
        return 0

    # espeak keeps the phase of vibrato and noise in static variables that no call resets, so a line would depend on
    # earlier ones. Therefore the library is reloaded for each line (about 10 ms).
    with _ONE_LINE:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            voices = str(espeakng_loader.get_data_path())
            if library.espeak_Initialize(_RETRIEVAL, 0, voices.encode(), _DONT_EXIT) < 0:
                raise InputError(f"espeak-ng cannot read its voices in {voices}")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.espeak_SetSynthCallback(receive)
            if library.espeak_SetVoiceByName(variant.encode()):
                raise InputError(f"espeak-ng has no voice {variant}")
            library.espeak_SetParameter(_RATE, speed, 0)
            library.espeak_SetParameter(_PITCH, pitch, 0)
            text = line.encode() + b"\0"
            library.espeak_Synth(text, len(text), 0, _CHARACTER, 0, _UTF8, None, None)
            library.espeak_Synchronize()
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
    return np.frombuffer(b"".join(chunks), np.int16) / 32768.0, starts
