"""Use a local checkpoint as the judge instead of an endpoint. Its answers are cached too."""

import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from avocado_jax.checkpoint.load import identity, open_language_model
from avocado_jax.data.prompt import chat_prompt
from avocado_jax.data.rows import Row, Shape, rounded, shape_of, text_row
from avocado_jax.eval.captioner import load_captioner
from avocado_jax.remote.cache import Answers, open_cache
from avocado_jax.remote.call import Malformed
from avocado_jax.remote.chat import Reply
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.engine import Engine

T = TypeVar("T")
ANSWER_TOKENS = 512
QUIET = 3  # iterations of the event loop without a new question before the waiting ones are answered


class _Waiting(NamedTuple):
    row: Row
    answer: asyncio.Future[str]


class LocalJudge:
    """A text or thinker checkpoint, prompted in Qwen's chat format and decoded greedily with the captioning engine.

    Waiting questions are answered in batches of one shape. Because decoding is deterministic, malformed answers are
    not retried, and the answers do not depend on the round.

    Attributes:
        counts: "calls", "cached" and "malformed" answers.
        trouble: error message of the latest malformed answer.
        ended: always empty: a local judge does not stop.
        returned: always empty: no endpoint returns model names.

    Raises:
        InputError: the folder has no language model, or no tokenizer of its vocabulary.
    """

    def __init__(
        self, folder: str, dtype: str, cache: Path | Answers | None, batch: int = 8, length: int = ANSWER_TOKENS
    ):
        checkpoint = open_language_model(folder)
        self.counts: Counter[str] = Counter()
        self.trouble = self.ended = ""
        self.returned: Counter[str] = Counter()
        self._length, self._batch = length, batch
        self._identity = identity(checkpoint)
        self._cache = open_cache(cache)
        self._dtype = dtype
        self._checkpoint, self._model = checkpoint, None
        self._waiting: list[_Waiting] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[str], T],
        *,
        options: Mapping[str, Any] | None = None,
        sample: int = 0,
    ) -> Reply[T]:
        """Like `remote.chat.ChatClient.ask`; `options` and `sample` are ignored."""
        key = [self._identity, self._dtype, self._length, list(messages)]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if (known := self._cache.get(name)) is not None:
            text = known["answer"]
            self.counts["cached"] += 1
        else:
            row = self._row(messages)
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(_Waiting(row, future))
            if len(self._waiting) == 1:
                asyncio.get_running_loop().call_soon(self._settle, 1, 0)
            text = await future
            self.counts["calls"] += 1
            self._cache.put(name, {"model": "local", "answer": text})
        try:
            return Reply(read(text), text)
        except Malformed as error:
            self.trouble = " ".join(str(error).split())
            if not self.counts["malformed"]:
                print(f"judge: malformed: {self.trouble}", file=sys.stderr)
            self.counts["malformed"] += 1
            return Reply(None, text, self.trouble)

    def run_all(self, works: Iterable[Coroutine[Any, Any, T]]) -> Iterator[tuple[int, T]]:
        """Run coroutines that ask questions, a few batches concurrently; yield (index, result) of each."""
        loop = asyncio.new_event_loop()
        running: dict[asyncio.Task[T], int] = {}
        waiting = enumerate(works)
        try:
            while True:
                for number, work in islice(waiting, 4 * self._batch - len(running)):
                    running[loop.create_task(work)] = number
                if not running:
                    return
                done, _ = loop.run_until_complete(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            if running:
                loop.run_until_complete(asyncio.wait(running))
            self._waiting.clear()
            loop.close()

    def __enter__(self) -> "LocalJudge":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _row(self, messages: Sequence[Mapping[str, Any]]) -> Row:
        texts = {message["role"]: message["content"].encode(errors="replace").decode() for message in messages}
        prompt = chat_prompt(self._captioner().tokenizer, texts["user"], texts.get("system", ""))
        return text_row([*prompt.before, *prompt.after])

    def _captioner(self) -> Captioner:
        if self._model is None:
            self._model = load_captioner(self._checkpoint, "", self._dtype)
        return self._model

    def _settle(self, known: int, turns: int) -> None:
        """Answer the waiting questions once no new one has arrived for a few iterations, so that batches are full."""
        loop = asyncio.get_running_loop()
        if turns < QUIET:
            count = len(self._waiting)
            loop.call_soon(self._settle, count, turns + 1 if count == known else 0)
            return
        shapes: dict[Shape, list[_Waiting]] = {}
        for question in self._waiting:
            shapes.setdefault(rounded(shape_of(question.row.clip), 2), []).append(question)
        shape = max(shapes, key=lambda shape: len(shapes[shape]))
        part = shapes[shape][: self._batch]
        taken = {id(question) for question in part}
        self._waiting = [question for question in self._waiting if id(question) not in taken]
        if self._waiting:
            loop.call_soon(self._settle, len(self._waiting), 0)
        try:
            texts = self._answers([question.row for question in part], shape)
        except Exception as error:  # pass any exception to the callers, which would otherwise wait forever
            for question in part:
                question.answer.set_exception(error)
            return
        for question, text in zip(part, texts):
            question.answer.set_result(text)

    def _answers(self, rows: list[Row], shape: Shape) -> list[str]:
        captioner = self._captioner()
        requests = [(number, row, 0) for number, row in enumerate(rows)]
        answers = dict(Engine(captioner, self._length, slots=self._batch).run(requests))
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [words(captioner, answers[number]) for number in range(len(rows))]
