"""A lane: slots for clips with the same number of padded tokens, and their requests."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.data.rows import Shape, stack
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.arrivals import Arrivals, Request
from avocado_jax.sampling.captioner import Captioner
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Clip, Int

T = TypeVar("T")
PREFILL_TOKENS = 1024  # tokens of the clips prefilled together on one data shard; more do not increase the MFU
NO_TOKENS = np.zeros(0, np.int32)
PATIENCE = 4  # dispatches before an incomplete prefill batch is admitted


def prefilled_together(tokens: int, slots: int) -> int:
    """The number of clips that a data shard prefills together.

    At most a quarter of its slots, because clips prefilled together must wait for free slots.
    """
    return int(np.clip(PREFILL_TOKENS // max(1, tokens), 1, max(1, slots // 4)))


class Decoding(NamedTuple):
    """Settings of a lane.

    Attributes:
        length: maximum number of tokens of a caption.
        shards: data shards of the mesh.
        drop: see `Engine`.
    """

    captioner: Captioner
    mesh: Any
    shards: int
    length: int
    sampling: Sampling
    seed: int
    drop: Callable[[Any, Int[Array, "N"]], bool] | None = None


class _Prepared(NamedTuple):
    """Clips of one shape on the devices that wait for free slots."""

    shape: Shape
    oldest: bool  # whether the clips are the oldest of the lane
    requests: list[Request | None]  # by row; the rows of each data shard are the clips that it prefills together
    clips: Clip | None = None


class Lane(Generic[T]):
    """The slots of a lane.

    Args:
        tokens: tokens of the padded clips.
        slots: number of slots, a multiple of the data shards.
        announce: called with the name of each program before its dispatch.
    """

    def __init__(self, decoding: Decoding, tokens: int, slots: int, announce: Callable[[str], None]) -> None:
        self._decoding, self._tokens, self._announce = decoding, tokens, announce
        self._in_slots: list[Request | None] = [None] * slots
        self._shards, self._per_shard = decoding.shards, slots // decoding.shards
        self._together = prefilled_together(tokens, self._per_shard)
        self._patience, self._next = PATIENCE, None
        self._steps = np.zeros(slots, np.int32)  # number of tokens of each caption
        self.shape: Shape | None = None  # shape of the clips prefilled last, or being stacked
        self._where = decoding.captioner.config, decoding.mesh
        self._slots = programs.empty(*self._where, tokens, slots, decoding.length)

    @property
    def requests(self) -> list[Request]:
        """The requests in slots, and those waiting on the devices."""
        waiting = self._next.requests if self._next else []
        return [request for request in (*self._in_slots, *waiting) if request is not None]

    @property
    def busy(self) -> bool:
        """Whether any slot is decoding."""
        return any(request is not None for request in self._in_slots)

    def prepare(self, arrivals: Arrivals, fewer: bool = False) -> None:
        """Stack the next clips of one shape and transfer them to the devices during decoding.

        Args:
            fewer: allow an incomplete prefill batch.
        """
        shapes, places = arrivals.shapes(self._tokens), self._together * self._shards
        if self._next is not None or not shapes:
            return
        full = [shape for shape in shapes if arrivals.waiting(shape) >= places]
        if not (found := shapes if fewer or self._patience <= 0 else full):
            return
        shape, drop = found[0], self._decoding.drop
        taken = arrivals.take(shape, places)
        if drop and not (taken := [request for request in taken if not drop(request.item, NO_TOKENS)]):
            return
        free = self._free()
        shards = sorted(range(self._shards), key=lambda shard: -len(free[shard]))
        requests: list[Request | None] = [None] * places
        for number, request in enumerate(taken):
            requests[shards[number % self._shards] * self._together + number // self._shards] = request
        self._next = _Prepared(shape, shape == shapes[0], requests)
        clips = [(request or taken[0]).row.clip for request in requests]  # pad rows, so that there is one program
        before, self.shape = self.shape, shape
        self._next = self._next._replace(clips=self._transfer(stack(clips, shape)))
        self.shape = before

    def admit(self, arrivals: Arrivals) -> int:
        """Prefill the next clips into free slots. Returns their number.

        Prefill batches are complete if possible, since smaller ones cost the same. The oldest clips are prefilled after
        at most `PATIENCE` dispatches or admissions of other clips, and immediately if no slot is decoding.
        """
        if not any(free := self._free()):
            return 0
        hurry = not self.busy or self._patience <= 0
        self.prepare(arrivals, fewer=hurry)
        if self._next is None:
            self._patience -= bool(arrivals.shapes(self._tokens))
            return 0
        requests, drop = self._next.requests, self._decoding.drop
        for row, request in enumerate(requests):
            if drop and request is not None and drop(request.item, NO_TOKENS):  # dropped after stacking
                requests[row] = None
        index = np.full((self._shards, self._together), self._per_shard, np.int32)  # past the last slot
        numbers = np.zeros(index.size, np.int32)
        for row, request in enumerate(requests):
            shard, position = divmod(row, self._together)
            if request is not None and free[shard]:
                index[shard, position], numbers[row] = free[shard].pop(0), request.number
        rows = np.flatnonzero(index.reshape(-1) < self._per_shard).tolist()
        if len(rows) < sum(request is not None for request in requests) and not hurry:
            self._patience -= 1
            return 0
        if not rows:
            if not any(request is not None for request in requests):
                self._next = None
            return 0
        self._patience = PATIENCE if self._next.oldest else self._patience - 1
        self.shape = self._next.shape
        self._announce(f"prefill of {len(requests)} clips of {self._next.shape}")
        self._slots = programs.admit(
            self._slots,
            self._decoding.captioner.params,
            self._next.clips,
            None,
            np.uint32(self._decoding.seed),
            numbers,
            index,
            *self._where,
        )
        for row in rows:
            slot = row // self._together * self._per_shard + int(index.reshape(-1)[row])
            self._in_slots[slot], self._steps[slot], requests[row] = requests[row], 0, None
        if not any(request is not None for request in requests):
            self._next = None
        return len(rows)

    def advance(self) -> None:
        """Dispatch up to `slots.STEPS` decoding steps of all slots."""
        captioner, length = self._decoding.captioner, self._decoding.length
        decoding = [step for step, request in zip(self._steps, self._in_slots) if request is not None]
        window = programs.window_of(length, int(max(decoding, default=0)))
        self._announce(f"decoding of {len(self._steps)} captions behind {window} tokens")
        static = (*self._where, self._decoding.sampling, captioner.stops, window)
        self._slots = programs.advance(self._slots, captioner.params, captioner.banned, *static)

    def finished(self) -> list[tuple[T, Int[Array, "N"]]]:
        """Return the finished captions, and free their slots and those of dropped requests."""
        stopped, steps = jax.device_get((self._slots.stopped, self._slots.step))
        self._steps, drop = steps.copy(), self._decoding.drop  # device arrays are read-only
        occupied = [(slot, request) for slot, request in enumerate(self._in_slots) if request is not None]
        if not drop and not any(stopped[slot] for slot, _ in occupied):
            return []
        tokens, done = jax.device_get(self._slots.tokens), []
        for slot, request in occupied:
            caption = tokens[slot, : steps[slot]]
            if stopped[slot]:
                done.append((request.item, caption.copy()))
            elif not (drop and drop(request.item, caption)):
                continue
            self._in_slots[slot] = None
        return done

    def _free(self) -> list[list[int]]:
        """The free slots of each data shard, by index in the shard."""
        return [
            [slot for slot in range(self._per_shard) if self._in_slots[shard * self._per_shard + slot] is None]
            for shard in range(self._shards)
        ]

    def _transfer(self, clips: Clip) -> Clip:
        """Transfer the rows of each data shard to its devices. All processes have all rows."""
        if self._decoding.mesh is None:
            return jax.device_put(clips)
        rows = NamedSharding(self._decoding.mesh, PartitionSpec(ROWS))
        return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, rows, leaf.__getitem__), clips)
