"""The captioning engine: a fixed number of slots decode together, and a finished slot takes the next clip.

Clips of one number of padded tokens share a lane. One lane exists at a time: the next one is that of the oldest waiting
clip. A caption depends on its clip, its number and the seed, not on the clips beside it.

Over a mesh, slots are sharded over the data axes and each clip is prefilled where its slot is.
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
CPU_SLOTS, MOST_SLOTS = 16, 64  # of a data shard
USABLE = 0.7  # share of a device's memory for parameters and caches; the rest is for prefill and fragmentation
LANE_ROUNDS = 8  # clips that a slot captions, on average, while clips of other lanes wait


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
        report: called with the name of each program when it is first used, before it is compiled.
        gather: seconds to wait for clips, before each dispatch, while there are fewer than for half of the slots. For
            devices that share their cores with what reads the clips: a dispatch costs the same for any number of them.
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
        arrivals = Arrivals(requests, self._shape)
        with contextlib.closing(arrivals):
            while arrivals.next_clip():
                yield from arrivals.failed()
                if shapes := arrivals.shapes():
                    yield from self._run_lane(shapes[0].tokens, self.slots(shapes[0].tokens), arrivals)
            yield from arrivals.failed()

    def _run_lane(self, tokens: int, slots: int, arrivals: Arrivals) -> Iterator[tuple[T, Any]]:
        """Caption the waiting clips of a lane until there are none, or clips of another lane have waited long.

        If the devices have too little memory, the lane gets half of the slots. With the fewest, the clips of the shape
        that was prefilled last get the error.
        """
        lane: Lane[T] | None = None
        finished, most = [], LANE_ROUNDS * slots
        how = Decoding(self.captioner, self.mesh, self.shards, self.length, self.sampling, self.seed, self._drop)
        try:
            with self._on_mesh():
                lane = Lane(how, tokens, slots, self._announce)
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
            failed = error.with_traceback(None)  # its frames hold the caches
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
        """Slots of a lane of clips of so many padded tokens."""
        if self._slots is not None:
            return -(-self._slots // self.shards) * self.shards
        if self._cache_bytes is None:
            return CPU_SLOTS * self.shards
        tensor = self.mesh.shape["tensor"] if self.mesh else 1
        return slots_in(self._cache_bytes, self.captioner.config, tokens, self.length, tensor) * self.shards


def slots_in(cache_bytes: int, config: ThinkerConfig, tokens: int, length: int, tensor: int) -> int:
    """Slots of a data shard with caches of so many bytes on each of its `tensor` devices.

    Args:
        tokens: of a padded clip.
        length: maximum number of tokens of a caption.
    """
    of_slot = kv_bytes(config, jnp.dtype(config.dtype).itemsize) * (tokens + length)
    if config.text.kv_heads % tensor == 0:
        of_slot //= tensor
    return int(np.clip(cache_bytes // of_slot, 1, MOST_SLOTS))


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


def caption_records(captioner: Captioner, records: Sequence[Record], length: int, slots: int) -> list[str | None]:
    """The greedy caption of each record's clip with the record's own prompt; None for a clip that cannot be read.

    All processes of a training job call this with the same records. A clip that one of them cannot read has no
    caption on any.
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
    shape = rounded(fit([shape_of(row.clip) for _, row, _ in requests]))  # one: the programs are compiled once
    for number, tokens in Engine(captioner, length, slots=slots, shape=shape).run(requests):
        if isinstance(tokens, Exception):
            raise tokens
        captions[number] = words(captioner, tokens)
    return captions
