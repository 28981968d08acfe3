"""The captioning engine: continuous batching with a fixed number of slots. A finished slot is refilled.

Clips with the same number of padded tokens share a lane. One lane exists at a time; the next lane is that of the oldest
waiting clip. A caption depends on its clip, its number and the seed, not on the other clips in the slots.

Over a mesh, slots are sharded over the data axes, and each clip is prefilled on the devices of its slot.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from avocado_jax.data.records import Record, decoded
from avocado_jax.data.rows import Row, Shape, fit, rounded, shape_of
from avocado_jax.data.storage import StorageError
from avocado_jax.errors import InputError, runtime_code
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.flops import kv_bytes
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling.arrivals import Arrivals
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.lane import Decoding, Lane
from avocado_jax.sampling.logits import GREEDY, Sampling
from avocado_jax.typing import Array, Int

T = TypeVar("T")
CPU_SLOTS, MOST_SLOTS = 16, 64  # default on CPU and maximum slots of a data shard
USABLE = 0.7  # share of a device's memory for parameters and caches; the rest is for prefill and fragmentation
LANE_ROUNDS = 8  # mean number of clips per slot before a lane yields to waiting clips of other lanes


class Engine(Generic[T]):
    """Captions a stream of clips.

    Args:
        captioner: captioner with parameters on one device, or over a mesh of the local devices.
        length: maximum number of tokens of a caption.
        seed: seed of the random draws.
        slots: number of captions decoded together, rounded up to a multiple of the mesh's data shards.
        cache_bytes: bytes of a device for caches, which determine the slots of each data shard (at most `MOST_SLOTS`)
            if `slots` is None. None: `CPU_SLOTS`.
        shape: padded shape of all clips; None: each clip's sizes, rounded up.
        drop: (item, tokens so far) -> whether to drop a request. Called before admission, and after each dispatch for
            unfinished captions. Nothing is yielded for a dropped request, and its slot is freed.
        report: called with the name of each program before its first use.
        gather: seconds to wait for clips before each dispatch while less than half of the slots can be filled. For
            CPUs, whose cores also read the clips: the cost of a dispatch does not depend on the number of clips.
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
        report: Callable[[str], None] = lambda program: None,
        gather: float = 0.0,
    ) -> None:
        self.captioner, self.length, self.sampling, self.seed = captioner, length, sampling, seed
        sharding = jax.tree.leaves(captioner.params)[0].sharding
        self.mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.shards = math.prod(self.mesh.shape[axis] for axis in ROWS) if self.mesh else 1
        self._slots, self._cache_bytes, self._shape = slots, cache_bytes, shape
        self._drop, self._report, self._reported, self._gather = drop, report, set[str](), gather

    def run(
        self, requests: Iterable[tuple[T, Row | Exception, int]]
    ) -> Iterator[tuple[T, Int[Array, "N"] | Exception]]:
        """Caption clips and yield each on completion.

        Args:
            requests: (item to return, clip or error, number for the random draws). Iterated in a thread during
                decoding. A sequence is read immediately: all processes of a training job must schedule identically.

        Yields:
            The item, and the caption's tokens including a stop id, or the error: of the request, or because the
            devices have too little memory for the clip.

        Raises:
            JaxRuntimeError: other errors of the devices.
        """
        arrivals = Arrivals(requests, self._shape)
        with contextlib.closing(arrivals):
            while arrivals.next_clip():
                yield from arrivals.failed()
                if shapes := arrivals.shapes():
                    yield from self._run_lane(shapes[0].tokens, self.slots(shapes[0].tokens), arrivals)
            yield from arrivals.failed()

    def _run_lane(self, tokens: int, slots: int, arrivals: Arrivals) -> Iterator[tuple[T, Any]]:
        """Caption the clips of a lane until none are waiting, or clips of other lanes have waited long.

        If the devices run out of memory, the lane is restarted with half of the slots. With the minimum, the clips of
        the last prefilled shape get the error.
        """
        lane: Lane[T] | None = None
        finished, most = [], LANE_ROUNDS * slots
        decoding = Decoding(self.captioner, self.mesh, self.shards, self.length, self.sampling, self.seed, self._drop)
        try:
            with self._on_mesh():
                lane = Lane(decoding, tokens, slots, self._announce)
            while lane.busy or (most > 0 and (lane.requests or arrivals.shapes(tokens))):
                if self._gather:
                    arrivals.gather(slots // 2 - len(lane.requests), self._gather)
                with self._on_mesh():
                    admitted = 1
                    while admitted and (most > 0 or not arrivals.others(tokens)):
                        most -= (admitted := lane.admit(arrivals))
                    lane.advance()
                yield from finished  # while the devices decode
                finished = []
                yield from arrivals.failed()
                arrivals.receive()
                if most > 0 or not arrivals.others(tokens):
                    lane.prepare(arrivals)
                finished = lane.finished()
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and runtime_code(error) != "RESOURCE_EXHAUSTED":
                raise
            failed = error.with_traceback(None)  # its frames reference the caches
        else:
            yield from finished
            arrivals.put_back(lane.requests)
            return
        yield from finished
        shapes = [lane.shape] if lane and lane.shape else arrivals.shapes(tokens)
        arrivals.put_back(lane.requests if lane else ())
        del lane
        if slots > self.shards:
            yield from self._run_lane(tokens, max(self.shards, slots // 2 // self.shards * self.shards), arrivals)
            return
        for shape in shapes:
            yield from ((request.item, failed) for request in arrivals.take(shape, arrivals.waiting(shape)))

    def _announce(self, program: str) -> None:
        if program not in self._reported:
            self._reported.add(program)
            self._report(program)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def slots(self, tokens: int) -> int:
        """The number of slots of a lane of clips with `tokens` padded tokens."""
        if self._slots is not None:
            return -(-self._slots // self.shards) * self.shards
        if self._cache_bytes is None:
            return CPU_SLOTS * self.shards
        tensor = self.mesh.shape["tensor"] if self.mesh else 1
        return slots_in(self._cache_bytes, self.captioner.config, tokens, self.length, tensor) * self.shards


def slots_in(cache_bytes: int, config: ThinkerConfig, tokens: int, length: int, tensor: int) -> int:
    """The number of slots of a data shard with `cache_bytes` on each of its `tensor` devices.

    Args:
        tokens: tokens of a padded clip.
        length: maximum number of tokens of a caption.
    """
    slot_bytes = kv_bytes(config, jnp.dtype(config.dtype).itemsize) * (tokens + length)
    if config.text.kv_heads % tensor == 0:
        slot_bytes //= tensor
    return int(np.clip(cache_bytes // slot_bytes, 1, MOST_SLOTS))


def free_cache_bytes(params: Any) -> int | None:
    """The bytes of a device's memory available for caches in addition to these parameters; None on CPU.

    Depends only on the device kind and the parameters, so that a resumed run has the same slots.
    """
    leaves = jax.tree.leaves(params)
    memory = leaves[0].addressable_shards[0].device.memory_stats() or {}
    if not (limit := memory.get("bytes_limit")):
        return None
    used = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return max(0, int(USABLE * limit) - used)


def caption_records(captioner: Captioner, records: Sequence[Record], length: int, slots: int) -> list[str | None]:
    """Caption each record's clip greedily with the record's prompt; None for clips that cannot be read.

    All processes of a training job must call this with the same records. A clip that one process cannot read has no
    caption on any process.
    """
    rows: list[Row | None] = [None] * len(records)
    for number, record in enumerate(records):
        with contextlib.suppress(InputError, StorageError):
            rows[number] = captioner.row(decoded(record, captioner.reading), record.fields)
    read = np.array([row is not None for row in rows])
    if jax.process_count() > 1:
        read = np.all(multihost_utils.process_allgather(read), axis=0)
    captions: list[str | None] = [None] * len(records)
    requests = [(number, rows[number], 0) for number in np.flatnonzero(read).tolist()]
    if not requests:
        return captions
    shape = rounded(fit([shape_of(row.clip) for _, row, _ in requests]))  # one shape, so that programs compile once
    for number, tokens in Engine(captioner, length, slots=slots, shape=shape).run(requests):
        if isinstance(tokens, Exception):
            raise tokens
        captions[number] = words(captioner, tokens)
    return captions
