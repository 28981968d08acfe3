"""An estimate of the time of a collection of clips on this host, from a sample of its clips."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from avocado_jax.bench.measure import ceilings
from avocado_jax.data.rows import Row, rounded, shape_of
from avocado_jax.eval.captioner import captioning_mesh, parameter_shapes
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.parallel.chips import CHIPS, Chip
from avocado_jax.planning.captioning import clip_seconds
from avocado_jax.planning.report import memory_of
from avocado_jax.sampling.arrivals import SHAPE_BITS
from avocado_jax.sampling.engine import CPU_SLOTS, USABLE, slots_in

SAMPLED = 8  # clips that are read
CAPTION_TOKENS = 640  # of a caption, on average, if so many are allowed


class Estimate(NamedTuple):
    """Of one clip on average.

    Attributes:
        tokens: of a clip.
        caption: tokens of the caption of a clip or segment, as assumed.
        device_seconds: of all devices.
        read_seconds: of all processes that read; 0 if one clip was read.
    """

    clips: int  # that were read
    tokens: float
    caption: int
    device_seconds: float
    read_seconds: float
    devices: int


def estimate_clips(
    config: ThinkerConfig,
    requests: Iterable[tuple[Any, Row | Exception, int]],
    clips: int,
    length: int,
    batch: int | None,
    mesh: tuple[int, int] | None,
) -> Estimate | None:
    """Read some clips, and compute the time of their captions. None if no clip can be read.

    Ceilings of the devices are their data sheet's, or measured.

    Args:
        requests: as for `Engine.run`, of all segments of so many clips.
        length: maximum number of tokens of a caption.
        batch, mesh: as given to `caption`.
    """
    times, rows = [], []
    for _, row, _ in requests:
        times.append(time.monotonic())
        if not isinstance(row, Exception):
            rows.append(row)
    clips -= len(times) - len(rows)  # an error is that of a clip
    if not rows or clips < 1:
        return None
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameter_shapes(config)))
    placed, device, caption = captioning_mesh(size, mesh), jax.local_devices()[0], min(length, CAPTION_TOKENS)
    data, tensor = (placed.shape["data"], placed.shape["tensor"]) if placed else (1, 1)
    chip = CHIPS.get(device.device_kind)
    if chip is None:
        top = ceilings(config.dtype)
        chip = Chip(top.flops, memory_of(device), top.bytes, float("inf"))
    seconds = 0.0
    for row in rows:
        shape = rounded(shape_of(row.clip), SHAPE_BITS)
        cache_bytes = max(0, int(USABLE * chip.memory) - size // tensor)
        most = CPU_SLOTS if device.platform == "cpu" else slots_in(cache_bytes, config, shape.tokens, length, tensor)
        slots = -(-batch // data) if batch else most
        seconds += clip_seconds(config, shape, caption, slots, chip, tensor) / data
    return Estimate(
        clips=clips,
        tokens=sum(len(row.clip.tokens) for row in rows) / clips,
        caption=caption,
        device_seconds=seconds / clips,
        read_seconds=(times[-1] - times[0]) / max(1, clips - 1),  # the first one waits for the processes to start
        devices=data * tensor,
    )


def estimate_line(estimate: Estimate, clips: int) -> str:
    """The estimate for a number of clips, in words."""
    each = max(estimate.device_seconds, estimate.read_seconds)
    return (
        f"estimate, from {estimate.clips} clips of {estimate.tokens:.0f} tokens on average and captions of "
        f"{estimate.caption}: {estimate.device_seconds:.2g} s a clip on {estimate.devices} devices, "
        f"{estimate.read_seconds:.2g} s to read it; {clips} clips take {clips * each / 3600:.2g} h, "
        f"{3600 / each / estimate.devices:.0f} clips per chip-hour"
    )
