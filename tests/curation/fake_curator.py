"""A fake endpoint that answers with the truth of AVWorld clips, which it recognises by the media of a request."""

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
    """AVWorld clips (index, level) with their truth and plain captions; `path` is the file."""
    folder.mkdir(parents=True)
    made = []
    for index, level in scripts:
        script = make_script(7, index, "train", level)
        path = folder / f"{script.id}.mp4"
        write_clip(script, path)
        made.append(record(script, references=0) | {"path": path})
    return made


def visual_sentences(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Sentences of a clip's visual caption. Crossmodal events are described by their picture."""
    return _sentences(truth, ("visual", "cross"), 0)


def audio_sentences(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Sentences of a clip's audio caption."""
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
    """A visual sentence that occurs unchanged in the caption."""
    return next(sentence["text"] for sentence in visual_sentences(truth)[2:] if sentence["text"] in truth["caption"])


def unique_keypoints(truth: dict[str, Any]) -> list[dict[str, str]]:
    """Keypoints of a clip without duplicates."""
    return list({point["text"]: point for point in truth["keypoints"][::-1]}.values())[::-1]


def stage_of(request: dict[str, Any]) -> str:
    """The stage of a request, by the start of its prompt."""
    prompt = " ".join(request["messages"][0]["content"].split())
    (stage,) = {stage for words, stage in STAGES.items() if words in prompt.split(".")[0]}
    return stage


class FakeCurator:
    """Answers for `chat.chat_server`. Media of a request are decoded and compared with those of the clips."""

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
        """The true answer of a stage."""
        return {
            "visual": lambda: {"sentences": visual_sentences(truth)},
            "audio": lambda: {"sentences": audio_sentences(truth)},
            "fusion": lambda: {"caption": truth["caption"]},
            "completeness": lambda: {"score": 5},
            "keypoints": lambda: {"keypoints": truth["keypoints"]},
            "dialogues": lambda: {
                "dialogues": [
                    {"speaker": dialogue["speaker"], "text": dialogue["text"]} for dialogue in truth["dialogues"]
                ]
            },
        }[stage]()

    def __call__(self, number: int, request: dict[str, Any]) -> Any:
        return self.but(lambda stage, truth, answer, attempt: answer)(number, request)

    def but(self, change: Callable[[str, dict[str, Any], dict[str, Any], int], Any]) -> Callable[[int, dict], Any]:
        """As `answer`, but `change(stage, truth, answer, attempt)` replaces the answer or returns a fault."""

        def answer(number: int, request: dict[str, Any]) -> Any:
            try:
                stage, truth = stage_of(request), self.truth_of(request)
                made = change(stage, truth, self.answer(stage, truth), len(request["messages"]) // 2)
            except Exception as error:  # otherwise the client would retry
                return 400, {}, repr(error).encode()
            return json.dumps(made) if isinstance(made, dict) else made

        return answer


def decoded(file: bytes) -> np.ndarray:
    """Decode a JPEG file."""
    codec = av.CodecContext.create("mjpeg", "r")
    (frame,) = [*codec.decode(av.Packet(file)), *codec.decode(None)]
    return frame.to_ndarray(format="rgb24")
