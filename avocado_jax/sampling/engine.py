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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from avocado_jax.data.records import Record, decoded
from avocado_jax.data.rows import Row, Shape, rounded, shape_of, stack
from avocado_jax.errors import InputError
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.logits import GREEDY, Sampling
from avocado_jax.typing import Array, Int

T = TypeVar("T")
SHAPE_BITS = 2  # of each size that clips are padded to: few shapes, so few programs
PREFILL_TOKENS = 4096  # of the clips that are prefilled together on one data shard
CPU_SLOTS, MOST_SLOTS = 16, 64  # of a data shard
USABLE = 0.7  # share of a device's memory for parameters and caches; the rest is for prefill and fragmentation
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
    """

    def __init__(
        self,
        captioner: Captioner,
        length: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        slots: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.captioner, self.length, self.sampling, self.seed = captioner, length, sampling, seed
        sharding = jax.tree.leaves(captioner.params)[0].sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.shards = math.prod(self.mesh.shape[axis] for axis in ROWS) if self.mesh else 1
        self._slots, self._cache_bytes = slots, cache_bytes

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
            request, or of the devices on clips of this shape.
        """
        arrivals, waiting = _Arrivals(requests), deque()
        with contextlib.closing(arrivals):
            while not arrivals.ended or waiting:
                arrivals.move_to(waiting, block=not waiting)
                yield from arrivals.failed()
                if waiting:
                    yield from self._run_lane(waiting[0][0], waiting, arrivals)

    def _run_lane(self, shape: Shape, waiting: deque, arrivals: "_Arrivals") -> Iterator[tuple[T, Any]]:
        """Caption the waiting clips of one shape until there are none; clips of other shapes stay in `waiting`."""
        lane: _Lane[T] | None = None
        try:
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                lane = _Lane(self, shape, self.slots(shape))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            yield from self._failed(shape, waiting, error)
            return
        while True:
            mine = [request for request in waiting if request[0] == shape]
            if not mine and not lane.busy:
                return
            try:
                with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                    for request in lane.admit(mine):
                        waiting.remove(request)
                    lane.advance()
                    arrivals.move_to(waiting)  # while the devices decode
                    finished = lane.finished()
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                yield from ((item, error) for item in lane.items if item is not None)
                yield from self._failed(shape, waiting, error)
                return
            yield from finished
            yield from arrivals.failed()

    def _failed(self, shape: Shape, waiting: deque, error: Exception) -> Iterator[tuple[T, Exception]]:
        """The waiting clips of a shape that the devices cannot caption."""
        failed = [request for request in waiting if request[0] == shape]
        for request in failed:
            waiting.remove(request)
        yield from ((item, error) for _, item, _, _ in failed)

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


class _Lane(Generic[T]):
    """The slots of one clip shape, and the requests in them."""

    def __init__(self, engine: Engine[T], shape: Shape, slots: int) -> None:
        self._engine, self._shape, self._captioner = engine, shape, engine.captioner
        self.items: list[T | None] = [None] * slots
        self._shards, self._per_shard = engine.shards, slots // engine.shards
        self._together = int(np.clip(PREFILL_TOKENS // shape.tokens, 1, self._per_shard))
        config = self._captioner.config
        self._options = dict(config=config, mesh=engine.mesh)
        self._slots = programs.empty(clip_tokens=shape.tokens, slots=slots, length=engine.length, **self._options)

    @property
    def busy(self) -> bool:
        """Whether a slot decodes a caption."""
        return any(item is not None for item in self.items)

    def admit(self, requests: Sequence[tuple[Shape, T, Row, int]]) -> list[tuple[Shape, T, Row, int]]:
        """Prefill some requests into free slots, as soon as as many are free as are prefilled together.

        Returns:
            Those that were admitted.
        """
        free = [
            [slot for slot in range(self._per_shard) if self.items[shard * self._per_shard + slot] is None]
            for shard in range(self._shards)
        ]
        places = min(len(requests), self._together * self._shards)
        if not requests or sum(min(self._together, len(one)) for one in free) < places:
            return []
        index = np.full((self._shards, self._together), self._per_shard, np.int32)  # past the last slot: dropped
        rows: list[Row | None] = [None] * index.size
        numbers = np.zeros(index.size, np.int32)
        counts = [0] * self._shards
        for _, item, row, number in requests[:places]:
            shard = max(range(self._shards), key=lambda one: (counts[one] < self._together, len(free[one])))
            slot, place = free[shard].pop(0), shard * self._together + counts[shard]
            index[shard, counts[shard]], rows[place], numbers[place] = slot, row, number
            self.items[shard * self._per_shard + slot] = item
            counts[shard] += 1
        clips = stack([(row or requests[0][2]).clip for row in rows], self._shape)
        seed = np.uint32(self._engine.seed)
        self._slots = programs.admit(self._slots, self._captioner.params, clips, seed, numbers, index, **self._options)
        return list(requests[:places])

    def advance(self) -> None:
        """Dispatch some decoding steps of all slots."""
        captioner, engine = self._captioner, self._engine
        options = dict(sampling=engine.sampling, stops=captioner.stops, length=engine.length, **self._options)
        self._slots = programs.advance(self._slots, captioner.params, captioner.banned, **options)

    def finished(self) -> list[tuple[T, Int[Array, "N"]]]:
        """The captions that have stopped; their slots become free."""
        stopped, steps = jax.device_get((self._slots.stopped, self._slots.step))
        done = [slot for slot, item in enumerate(self.items) if item is not None and stopped[slot]]
        if not done:
            return []
        tokens = jax.device_get(self._slots.tokens)
        captions = [(self.items[slot], tokens[slot, : steps[slot]].copy()) for slot in done]
        for slot in done:
            self.items[slot] = None
        return captions


class _Arrivals:
    """Requests that are read in a thread, within a bound on their bytes."""

    def __init__(self, requests: Iterable[tuple[Any, Row | Exception, int]]) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._closed, self.ended, self._failed = threading.Event(), False, []
        self._bytes, self._fewer = 0, threading.Condition()
        if isinstance(requests, Sequence):
            self._read(requests)
        else:
            threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def _read(self, requests: Iterable[tuple[Any, Row | Exception, int]]) -> None:
        bounded = not isinstance(requests, Sequence)
        try:
            for item, row, number in requests:
                if isinstance(row, Exception):
                    self._queue.put((item, row))
                    continue
                self._queue.put((rounded(shape_of(row.clip), SHAPE_BITS), item, row, number))
                with self._fewer:
                    self._bytes += _nbytes(row)
                    while bounded and self._bytes > WAITING_BYTES and not self._closed.is_set():
                        self._fewer.wait(1.0)
                if self._closed.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:  # raised again in the consumer's thread
            self._queue.put(error)

    def move_to(self, waiting: deque, block: bool = False) -> None:
        """Move the clips that have arrived to `waiting`; with `block`, wait for something to arrive or the end."""
        while not self.ended:
            try:
                arrived = self._queue.get(block=block)
            except queue.Empty:
                return
            if isinstance(arrived, BaseException):
                raise arrived
            block = False
            if arrived is None:
                self.ended = True
                return
            if len(arrived) == 2:
                self._failed.append(arrived)
                continue
            with self._fewer:
                self._bytes -= _nbytes(arrived[2])
                self._fewer.notify()
            waiting.append(arrived)

    def failed(self) -> list[tuple[Any, Exception]]:
        """The requests without a clip that have arrived since the last call."""
        failed, self._failed = self._failed, []
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
    for number, tokens in Engine(captioner, length, slots=slots).run(requests):
        if isinstance(tokens, Exception):
            raise tokens
        captions[number] = words(captioner, tokens)
    return captions
