"""The captioning engine: a fixed number of slots decode together, and a finished slot takes the next clip.

Clips of one padded shape share a lane, whose programs are those of `slots`. One lane exists at a time: the next
one takes the shape of the oldest waiting clip. A slot's caption depends on its clip, its number and the seed, not on
the clips beside it.

Over a mesh, slots are sharded over the data axes and each clip is prefilled where its slot is.
"""

import contextlib
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from avocado_jax.data.records import Record, decoded
from avocado_jax.data.rows import Row, Shape, fit, rounded, shape_of, stack
from avocado_jax.errors import InputError, runtime_code
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.logits import GREEDY, Sampling
from avocado_jax.typing import Array, Int

T = TypeVar("T")
SHAPE_BITS = 2  # of each size that clips are padded to: few shapes, so few programs
PREFILL_TOKENS = 2048  # of the clips that are prefilled together on one data shard
CPU_SLOTS, MOST_SLOTS = 16, 64  # of a data shard
USABLE = 0.7  # share of a device's memory for parameters and caches; the rest is for prefill and fragmentation
LANE_ROUNDS = 8  # clips that a slot captions, on average, while clips of other shapes wait
PATIENCE = 4  # dispatches until fewer clips are prefilled than could be together
WAITING_BYTES = 4 * 2**30  # of clips that are read and wait for a slot


class Engine(Generic[T]):
    """Captions clips as they come.

    Args:
        captioner: with parameters on one device, or over a mesh of the local devices.
        length: maximum number of tokens of a caption.
        seed: of the draws.
        slots: how many captions are decoded at once; it is rounded up to a multiple of the data shards of the mesh.
        cache_bytes: without `slots`: as many are decoded on each data shard as have caches of so many bytes on one
            device, at most `MOST_SLOTS`. None: `CPU_SLOTS`.
        shape: what all clips are padded to; None: each to its own sizes, rounded up.
        drop: called with every request before it is admitted, and after each dispatch with those whose caption is
            unfinished, and with the tokens so far. Where it returns True, nothing is yielded for this request, and its
            slot is free.
    """

    def __init__(
        self,
        captioner: Captioner,
        length: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        slots: int | None = None,
        cache_bytes: int | None = None,
        shape: Shape | None = None,
        drop: Callable[[T, Int[Array, "N"]], bool] | None = None,
    ) -> None:
        self.captioner, self.length, self.sampling, self.seed = captioner, length, sampling, seed
        sharding = jax.tree.leaves(captioner.params)[0].sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.shards = math.prod(self.mesh.shape[axis] for axis in ROWS) if self.mesh else 1
        self._slots, self._cache_bytes, self._shape, self.drop = slots, cache_bytes, shape, drop

    def run(
        self, requests: Iterable[tuple[T, Row | Exception, int]]
    ) -> Iterator[tuple[T, Int[Array, "N"] | Exception]]:
        """Caption clips, and yield each as it finishes.

        Args:
            requests: (what to return with the caption; the clip, or why it cannot be read; the number that with the
                seed decides its draws). Iterated in a thread while captions are decoded. A sequence is taken at
                once: all processes of a training job must schedule alike.

        Yields:
            What was requested, and the caption's tokens with the stop id if it was reached, or the error: of the
            request, or of a clip for which the devices have too little memory.

        Raises:
            JaxRuntimeError: the devices failed otherwise.
        """
        arrivals = _Arrivals(requests, self._shape)
        with contextlib.closing(arrivals):
            while arrivals.next_shape():
                yield from arrivals.failed()
                if shape := arrivals.oldest():
                    yield from self._run_lane(shape, self.slots(shape), arrivals)
            yield from arrivals.failed()

    def _run_lane(self, shape: Shape, slots: int, arrivals: "_Arrivals") -> Iterator[tuple[T, Any]]:
        """Caption the waiting clips of one shape until there are none, or clips of another shape have waited long.

        A shape for which the devices have too little memory gets half of the slots, and with the fewest an error.
        """
        lane: _Lane[T] | None = None
        finished, most = [], LANE_ROUNDS * slots
        try:
            with self._on_mesh():
                lane = _Lane(self, shape, slots)
            while lane.busy or (most > 0 and arrivals.waiting(shape)):
                with self._on_mesh():
                    if most > 0 or not arrivals.others(shape):
                        most -= lane.admit(arrivals, shape)
                    lane.advance()
                yield from finished  # while the devices decode
                yield from arrivals.failed()
                arrivals.receive()
                finished = lane.finished()
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and runtime_code(error) != "RESOURCE_EXHAUSTED":
                raise
            failed = error.with_traceback(None)  # its frames hold the caches
        else:
            yield from finished
            return
        yield from finished
        if lane is not None:
            arrivals.put_back(shape, lane.requests)
        del lane
        if slots > self.shards:
            yield from self._run_lane(shape, max(self.shards, slots // 2 // self.shards * self.shards), arrivals)
        else:
            yield from ((request.item, failed) for request in arrivals.take(shape, arrivals.waiting(shape)))

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def slots(self, shape: Shape) -> int:
        """Slots of a lane of clips of this shape."""
        if self._slots is not None:
            return -(-self._slots // self.shards) * self.shards
        if self._cache_bytes is None:
            return CPU_SLOTS * self.shards
        text, item = self.captioner.config.text, jnp.dtype(self.captioner.config.dtype).itemsize
        of_slot = 2 * text.layers * text.kv_heads * text.head * (shape.tokens + self.length) * item
        if self.mesh and text.kv_heads % self.mesh.shape["tensor"] == 0:
            of_slot //= self.mesh.shape["tensor"]
        return int(np.clip(self._cache_bytes // of_slot, 1, MOST_SLOTS)) * self.shards


def free_cache_bytes(params: Any) -> int | None:
    """Bytes of a device's memory for the caches of slots beside these parameters; None on a CPU.

    It depends on the kind of device and the parameters only, so that a resumed run has the same slots.
    """
    leaves = jax.tree.leaves(params)
    memory = leaves[0].addressable_shards[0].device.memory_stats() or {}
    if not (limit := memory.get("bytes_limit")):
        return None
    used = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return max(0, int(USABLE * limit) - used)


class _Request(NamedTuple):
    """A clip that waits or is in a slot."""

    item: Any
    row: Row
    number: int


class _Lane(Generic[T]):
    """The slots of one clip shape, and the requests in them."""

    def __init__(self, engine: Engine[T], shape: Shape, slots: int) -> None:
        self._engine, self._shape, self._captioner = engine, shape, engine.captioner
        self._in_slots: list[_Request | None] = [None] * slots
        self._shards, self._per_shard = engine.shards, slots // engine.shards
        self._together = int(np.clip(PREFILL_TOKENS // shape.tokens, 1, self._per_shard))
        self._patience = PATIENCE
        config = self._captioner.config
        self._options = dict(config=config, mesh=engine.mesh)
        self._slots = programs.empty(clip_tokens=shape.tokens, slots=slots, length=engine.length, **self._options)

    @property
    def requests(self) -> list[_Request]:
        """The requests in slots."""
        return [request for request in self._in_slots if request is not None]

    @property
    def busy(self) -> bool:
        """Whether a slot decodes a caption."""
        return bool(self.requests)

    def admit(self, arrivals: "_Arrivals", shape: Shape) -> int:
        """Prefill waiting clips once there are as many, and as many free slots, as are prefilled together.

        Fewer are prefilled after some dispatches, and at once if no slot decodes: the cost is the same.

        Returns:
            The number of clips that were admitted.
        """
        free = [
            [slot for slot in range(self._per_shard) if self._in_slots[shard * self._per_shard + slot] is None]
            for shard in range(self._shards)
        ]
        places = self._together * self._shards
        count = min(places, arrivals.waiting(shape), sum(min(self._together, len(one)) for one in free))
        if not count:
            return 0
        self._patience -= 1
        if count < places and self.busy and self._patience > 0:
            return 0
        self._patience = PATIENCE
        drop, none = self._engine.drop, np.zeros(0, np.int32)
        admitted = [one for one in arrivals.take(shape, count) if not (drop and drop(one.item, none))]
        if not admitted:
            return 0
        index = np.full((self._shards, self._together), self._per_shard, np.int32)  # past the last slot: dropped
        which, numbers = np.zeros(index.size, np.int32), np.zeros(index.size, np.int32)
        counts = [0] * self._shards
        for row, request in enumerate(admitted):
            shard = max(range(self._shards), key=lambda one: (counts[one] < self._together, len(free[one])))
            slot, place = free[shard].pop(0), shard * self._together + counts[shard]
            index[shard, counts[shard]], which[place], numbers[place] = slot, row, request.number
            self._in_slots[shard * self._per_shard + slot] = request
            counts[shard] += 1
        clips = [request.row.clip for request in admitted]
        clips += clips[-1:] * (min(places, arrivals.most) - len(clips))  # one shape, so one program
        clips, seed = stack(clips, self._shape), np.uint32(self._engine.seed)
        self._slots = programs.admit(
            self._slots, self._captioner.params, clips, which, seed, numbers, index, **self._options
        )
        return len(admitted)

    def advance(self) -> None:
        """Dispatch some decoding steps of all slots."""
        captioner, engine = self._captioner, self._engine
        options = dict(sampling=engine.sampling, stops=captioner.stops, length=engine.length, **self._options)
        self._slots = programs.advance(self._slots, captioner.params, captioner.banned, **options)

    def finished(self) -> list[tuple[T, Int[Array, "N"]]]:
        """The captions that have stopped; their slots become free, and those of requests that are dropped."""
        drop = self._engine.drop
        stopped, steps = jax.device_get((self._slots.stopped, self._slots.step))
        done = [(slot, one) for slot, one in enumerate(self._in_slots) if one is not None and stopped[slot]]
        if not (done or drop):
            return []
        tokens = jax.device_get(self._slots.tokens)
        for slot, one in enumerate(self._in_slots):
            if one is not None and (stopped[slot] or (drop and drop(one.item, tokens[slot, : steps[slot]]))):
                self._in_slots[slot] = None
        return [(request.item, tokens[slot, : steps[slot]].copy()) for slot, request in done]


class _Arrivals:
    """Requests, read in a thread within a bound on the bytes of those that wait, by shape and in order of arrival."""

    def __init__(self, requests: Iterable[tuple[Any, Row | Exception, int]], shape: Shape | None) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._shape, self._closed, self._ended = shape, threading.Event(), False
        self.most = len(requests) if isinstance(requests, Sequence) else 2**31  # clips that can arrive
        self._error: BaseException | None = None  # of the iterable
        self._errors: list[tuple[Any, Exception]] = []
        self._waiting: dict[Shape, deque[_Request]] = {}  # in the order of the oldest clip of each
        self._bytes, self._fewer = 0, threading.Condition()
        if isinstance(requests, Sequence):
            self._read(requests)
        else:
            threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def _read(self, requests: Iterable[tuple[Any, Row | Exception, int]]) -> None:
        bounded = not isinstance(requests, Sequence)
        try:
            for item, row, number in requests:
                if self._closed.is_set():
                    return
                self._queue.put(_Request(item, row, number))
                if isinstance(row, Exception):
                    continue
                with self._fewer:
                    self._bytes += _nbytes(row)
                    while bounded and self._bytes > WAITING_BYTES and not self._closed.is_set():
                        self._fewer.wait(1.0)
            self._queue.put(None)
        except BaseException as error:  # raised in the consumer's thread, behind the captions of earlier clips
            self._queue.put(error)

    def receive(self, block: bool = False) -> None:
        """Sort what has arrived; with `block`, wait for something to arrive or the end."""
        while not self._ended:
            try:
                arrived = self._queue.get(block=block)
            except queue.Empty:
                return
            block = False
            if not isinstance(arrived, _Request):
                self._ended, self._error = True, arrived
            elif isinstance(arrived.row, Exception):
                self._errors.append((arrived.item, arrived.row))
            else:
                shape = self._shape or rounded(shape_of(arrived.row.clip), SHAPE_BITS)
                self._waiting.setdefault(shape, deque()).append(arrived)

    def next_shape(self) -> bool:
        """Wait for a clip, an error or the end. Returns whether it is not the end. Raises the error of the iterable."""
        self.receive(block=not self._waiting)
        if self._waiting or self._errors or not self._ended:
            return True
        if self._error is not None:
            raise self._error
        return False

    def oldest(self) -> Shape | None:
        """The shape of the clip that has waited longest."""
        return next(iter(self._waiting), None)

    def waiting(self, shape: Shape) -> int:
        """Number of waiting clips of a shape."""
        return len(self._waiting.get(shape, ()))

    def others(self, shape: Shape) -> bool:
        """Whether clips of other shapes wait."""
        return any(one != shape for one in self._waiting)

    def take(self, shape: Shape, count: int) -> list[_Request]:
        """Remove the oldest clips of a shape."""
        clips = self._waiting.pop(shape, deque())
        taken = [clips.popleft() for _ in range(min(count, len(clips)))]
        if clips:  # behind the other shapes, whose oldest clips are older than most of these
            self._waiting[shape] = clips
        with self._fewer:
            self._bytes -= sum(_nbytes(request.row) for request in taken)
            self._fewer.notify()
        return taken

    def put_back(self, shape: Shape, requests: list[_Request]) -> None:
        """Let clips wait again."""
        self._waiting.setdefault(shape, deque()).extendleft(reversed(requests))
        with self._fewer:
            self._bytes += sum(_nbytes(request.row) for request in requests)

    def failed(self) -> list[tuple[Any, Exception]]:
        """The requests without a clip that have arrived since the last call."""
        failed, self._errors = self._errors, []
        return failed

    def close(self) -> None:
        self._closed.set()


def _nbytes(row: Row) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in row.clip)


def caption_records(captioner: Captioner, records: Sequence[Record], length: int, slots: int) -> list[str | None]:
    """The greedy caption of each record's clip with the record's own prompt; None for a clip that cannot be read.

    All processes of a training job call this with the same records.
    """
    captions: list[str | None] = [None] * len(records)
    requests = []
    for number, record in enumerate(records):
        with contextlib.suppress(InputError):
            requests.append((number, captioner.row(decoded(record, captioner.reading), record.fields), 0))
    if not requests:
        return captions
    shape = rounded(fit([shape_of(row.clip) for _, row, _ in requests]))  # one: the programs are compiled once
    for number, tokens in Engine(captioner, length, slots=slots, shape=shape).run(requests):
        if isinstance(tokens, Exception):
            raise tokens
        captions[number] = words(captioner, tokens)
    return captions
