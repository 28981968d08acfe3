"""A server whose answers describe its input; everything except the model is the product.

Run as a program, it prints its port. The last word of the question decides how it answers:
    slow: a word every 20 ms, 50 of them.    stuck: never.    fails: an internal error.    late: an error behind a word.
    breaks: an internal error behind a word.        warned: with a warning.
    anything else: JSON with the turns and the clip.
"""

import argparse
import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np

from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import Habits
from avocado_jax.data.reader import ClipReader
from avocado_jax.serving import download
from avocado_jax.serving.app import Limits, Server
from avocado_jax.serving.protocol import Answer, ApiError
from avocado_jax.serving.run import serve
from avocado_jax.serving.sources import Sources

READING = Reading(fewest_pixels=784, asked_pixels=12544)
HABITS = Habits("What happens?", "You are a stub.", True)
WORDS = [f"word{number}" for number in range(50)]


def digest(media) -> dict:
    """Digest of a clip in memory."""
    samples = None if media.samples is None else hashlib.sha256(media.samples.tobytes()).hexdigest()
    return {
        "shape": list(media.frames.shape),
        "frames": hashlib.sha256(media.frames.tobytes()).hexdigest(),
        "samples": samples,
        "seconds": round(media.seconds, 3),
    }


class StubBackend:
    """The last word of the question selects the answer."""

    def __init__(self) -> None:
        self.failed = asyncio.Event()

    async def prepare(self, chat, media):
        return (chat, media and digest(media)), ["dark"] if chat.turns[-1].text == "warned" else []

    async def answers(self, prepared):
        chat, clip = prepared
        how = (chat.turns[-1].text + (chat.turns[-1].after or "")).split()[-1:]
        if how == ["slow"]:
            for number in range(1, len(WORDS) + 1):
                await asyncio.sleep(0.02)
                yield Answer(" ".join(WORDS[:number]), number)
            yield Answer(" ".join(WORDS), len(WORDS), False, 7, True)
        elif how == ["stuck"]:
            await asyncio.Event().wait()
        elif how == ["fails"]:
            raise RuntimeError("a secret")
        elif how == ["breaks"]:
            yield Answer("word", 1)
            raise RuntimeError("a secret")
        elif how == ["late"]:
            yield Answer("word", 1)
            raise ApiError(400, "too late")
        else:
            text = json.dumps({"turns": chat.turns, "clip": clip, "limit": chat.limit})
            yield Answer(text, 9, bool(chat.limit), 7, True)


class TruthfulBackend:
    """Answers the questions of `curate` about AVWorld clips with the truth; the clip is found by its media."""

    def __init__(self, path: Path) -> None:
        from fake_curator import FakeCurator

        self.failed, self.curator = asyncio.Event(), FakeCurator(json.loads(path.read_text()))

    async def prepare(self, chat, media):
        from fake_curator import stage_of

        stage = stage_of({"messages": [{"content": chat.turns[0].text}]})
        if media is None:
            messages = [{"content": turn.text} for turn in chat.turns]
            truth = self.curator.truth_of({"messages": messages})
        else:
            distances = [self.distance(one, media, stage) for one in self.curator.media]
            assert min(distances) < (6 if stage == "visual" else 1e-3), distances
            truth = self.curator.truths[int(np.argmin(distances))]
        return json.dumps(self.curator.answer(stage, truth)), []

    def distance(self, known, media, stage) -> float:
        if stage == "audio":
            same = known.samples is not None and len(known.samples) == len(media.samples)
            return float(np.abs(known.samples.clip(-1, 1) - media.samples).max()) if same else np.inf
        same = known.frames.shape == media.frames.shape
        return float(np.abs(known.frames.astype(int) - media.frames).mean()) if same else np.inf

    async def answers(self, text):
        yield Answer(text, 1, False, 1, True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    parser.add_argument("--remote", action="store_true")
    parser.add_argument("--public", default="", help="this address is taken for a public one")
    parser.add_argument("--truths", type=Path, help="answer by the truth of these clips")
    parser.add_argument("--key")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=2**20)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--grace", type=float, default=10.0)
    args = parser.parse_args()
    if args.public:
        is_public = download.is_public
        download.is_public = lambda address: address == args.public or is_public(address)

    async def run() -> None:
        with ClipReader(2, 120.0) as reader:
            limits = Limits(args.requests, args.bytes, args.seconds, 60.0)
            sources = Sources(args.root, args.remote, 100_000, 3.0)
            hosts = None if args.key else frozenset(("127.0.0.1", "localhost", "::1"))
            backend = TruthfulBackend(args.truths) if args.truths else StubBackend()
            server = Server(backend, "stub", reader, READING, HABITS, sources, limits, args.key, hosts)
            await serve(server, "127.0.0.1", 0, args.grace, lambda port: print(port, flush=True))

    asyncio.run(run())


if __name__ == "__main__":
    main()
