"""A model that sees, hears and writes by the truth of AVWorld's clips: it knows them by what it is sent alone."""

import base64
import io
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from avocado_jax.data.decode import read_media
from avocado_jax.data.media import Reading
from avocado_jax.world.caption import statement
from avocado_jax.world.check import parse_sentence
from avocado_jax.world.clip import record, write_clip
from avocado_jax.world.director import make_script

SMALL = ["--fps", "1", "--frames", "8", "--pixels", "12544"]
READING = Reading(fps=1.0, most_frames=8, asked_pixels=12544, fewest_pixels=12544, align_sound=True)
STAGES = {
    "You write questions": "probes",
    "what can be seen": "visual",
    "what can be heard": "audio",
    "You weave": "fusion",
    "You compare": "completeness",
    "You split": "keypoints",
    "You list the lines": "dialogues",
}


def make_clips(folder: Path, scripts: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Clips (index, level) of AVWorld with their truth, told in plain captions; `path` is the file."""
    folder.mkdir(parents=True)
    made = []
    for index, level in scripts:
        script = make_script(7, index, "train", level)
        path = folder / f"{script.id}.mp4"
        write_clip(script, path)
        made.append(record(script, references=0) | {"path": path})
    return made


def visual_sentences(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The sentences of a clip's visual caption; a moment with a sound is told by its picture."""
    return _sentences(truth, ("visual", "cross"), 0)


def audio_sentences(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The sentences of its audio caption."""
    return _sentences(truth, ("audio", "speech", "cross"), 1)


def _sentences(truth: dict[str, Any], kinds: tuple[str, ...], part: int) -> list[dict[str, Any]]:
    sentences = []
    for event in sorted(truth["events"], key=lambda event: event["start"]):
        if event["kind"] in kinds:
            text = event["text"]
            if event["kind"] == "cross":
                text = statement(parse_sentence(text)[0].parts[part])
            sentences.append({"start": event["start"], "text": text})
    return sentences


def separate_sentence(truth: dict[str, Any]) -> str:
    """A sentence of what is seen that stands in its caption as it is."""
    return next(one["text"] for one in visual_sentences(truth)[2:] if one["text"] in truth["caption"])


def unique_keypoints(truth: dict[str, Any]) -> list[dict[str, str]]:
    """Its keypoints, each once."""
    return list({point["text"]: point for point in truth["keypoints"][::-1]}.values())[::-1]


def stage_of(request: dict[str, Any]) -> str:
    """Which prompt a request begins with."""
    prompt = " ".join(request["messages"][0]["content"].split())
    (stage,) = {stage for words, stage in STAGES.items() if words in prompt.split(".")[0]}
    return stage


class FakeCurator:
    """Answers for `chat.chat_server`. Pictures and sounds are decoded and compared with the clips themselves."""

    def __init__(self, truths: Sequence[dict[str, Any]]) -> None:
        self.truths = list(truths)
        self.media = [read_media(truth["path"], READING) for truth in truths]

    def truth_of(self, request: dict[str, Any]) -> dict[str, Any]:
        """The clip that a request is about."""
        content = request["messages"][1]["content"]
        if isinstance(content, list):
            kind = content[-1]["type"]
            distances = [self._distance(media, kind, content) for media in self.media]
            best = int(np.argmin(distances))
            assert distances[best] < (6 if kind == "image_url" else 1e-3), distances
            return self.truths[best]
        texts = json.loads(content)
        caption = texts.get("caption") or " ".join(one["text"] for one in texts["visual"] + texts["audio"])
        share = [
            np.mean(
                [
                    one["text"].strip(".").lower() in caption.lower()
                    for one in visual_sentences(truth) + audio_sentences(truth)
                ]
            )
            for truth in self.truths
        ]
        return self.truths[int(np.argmax(share))]

    def _distance(self, media: Any, kind: str, content: list[dict[str, Any]]) -> float:
        if kind == "input_audio":
            with wave.open(io.BytesIO(base64.b64decode(content[-1]["input_audio"]["data"]))) as file:
                assert (file.getnchannels(), file.getframerate()) == (1, 16_000)
                got = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
            same = media.samples is not None and len(media.samples) == len(got)
            return float(np.abs(np.clip(media.samples, -1, 1) - got).max()) if same else np.inf
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        times = [float(part["text"].split()[0]) for part in content[1:] if part["type"] == "text"]
        assert len(times) == len(urls)
        assert times == sorted(times)
        frames = np.stack([decoded(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))) for url in urls])
        if frames.shape != media.frames.shape or np.abs(times - media.times).max() > 0.006:  # they are rounded
            return np.inf
        return float(np.abs(frames.astype(int) - media.frames).mean())

    def answer(self, stage: str, truth: dict[str, Any]) -> dict[str, Any]:
        """What is true."""
        return {
            "visual": lambda: {"sentences": visual_sentences(truth)},
            "audio": lambda: {"sentences": audio_sentences(truth)},
            "fusion": lambda: {"caption": truth["caption"]},
            "completeness": lambda: {"score": 5},
            "keypoints": lambda: {"keypoints": truth["keypoints"]},
            "dialogues": lambda: {
                "dialogues": [{"speaker": one["speaker"], "text": one["text"]} for one in truth["dialogues"]]
            },
        }[stage]()

    def __call__(self, number: int, request: dict[str, Any]) -> Any:
        return self.but(lambda stage, truth, answer, attempt: answer)(number, request)

    def but(self, change: Callable[[str, dict[str, Any], dict[str, Any], int], Any]) -> Callable[[int, dict], Any]:
        """The same, with answers changed: `change(stage, truth, answer, attempt)` gives the answer, or a fault."""

        def answer(number: int, request: dict[str, Any]) -> Any:
            try:
                stage, truth = stage_of(request), self.truth_of(request)
                made = change(stage, truth, self.answer(stage, truth), len(request["messages"]) // 2)
            except Exception as error:  # else the client would ask again and again
                return 400, {}, repr(error).encode()
            return json.dumps(made) if isinstance(made, dict) else made

        return answer


def decoded(file: bytes) -> np.ndarray:
    """A JPEG file's picture."""
    codec = av.CodecContext.create("mjpeg", "r")
    (frame,) = [*codec.decode(av.Packet(file)), *codec.decode(None)]
    return frame.to_ndarray(format="rgb24")
