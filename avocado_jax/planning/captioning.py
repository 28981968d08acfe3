"""Captioning on devices that this machine may not have: the engine's programs compiled, and its clips per chip-hour."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.data.rows import Shape
from avocado_jax.eval.captioner import fewest_devices
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.models.flops import Work, decoding_work, prefill_work
from avocado_jax.models.thinker import example, init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.chips import Chip
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import bytes_per_device, shardings
from avocado_jax.planning.phases import STOPS, Phase
from avocado_jax.planning.program import kernel_of
from avocado_jax.planning.report import ATTAINED, compile_phase, describe, memory_of
from avocado_jax.planning.work import Flops
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.engine import USABLE, slots_in
from avocado_jax.sampling.lane import prefilled_together
from avocado_jax.sampling.logits import GREEDY
from avocado_jax.train.programs import with_sharding


def clip_seconds(model: ThinkerConfig, shape: Shape, caption: int, slots: int, chip: Chip, tensor: int = 1) -> float:
    """Seconds of `tensor` devices for a clip at ATTAINED of the binding ceiling: its prefill and its share of decoding.

    Communication is not counted.
    """
    prefill, step = _work(model, shape, caption, slots, tensor)
    first, each = (max(work.flops / tensor / chip.flops, work.bytes / chip.bandwidth) for work in (prefill, step))
    return (first + each * caption / slots) / ATTAINED


def caption_plan(model: ThinkerConfig, shape: Shape, caption: int, devices: list[Any]) -> Iterator[dict[str, Any]]:
    """Compile prefill and decoding for the devices of one host, each of which captions by itself.

    Args:
        model: computed in the dtype of its captions.
        shape: of the padded clips.
        caption: tokens of a caption.

    Yields:
        Two entries as `report` makes them, the second for STEPS decoding steps; then {"slots", "mesh",
        "clips_per_chip_hour"}, with None where the ceilings of the devices are unknown.
    """
    host = [device for device in devices if device.process_index == devices[0].process_index]
    model = kernel_of(computed(model, model.dtype, scan=False), host[0].platform)
    model = replace(model, text=replace(model.text, lora=None))
    params = jax.eval_shape(partial(init, model), jax.random.key(0))
    size, memory = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)), memory_of(host[0])
    tensor = fewest_devices(size, len(host), memory)
    mesh = make_mesh(len(host) // tensor, 1, tensor, devices=host)
    params = jax.tree.map(with_sharding, params, shardings(params, mesh, over=("tensor",)))
    cache_bytes = max(0, int(USABLE * memory) - bytes_per_device(params))
    per_shard = slots_in(cache_bytes, model, shape.tokens, caption, tensor)
    together, shards = prefilled_together(shape.tokens, per_shard), len(host) // tensor
    total, rows = per_shard * shards, together * shards
    phases = _phases(model, params, shape, caption, mesh, total, rows)

    prefill, step = _work(model, shape, caption, per_shard, tensor)
    work = Work(rows * prefill.flops, prefill.bytes), Work(step.flops * shards, step.bytes)
    seconds = 0.0
    for phase, (flops, nbytes), times in zip(phases, work, (1, programs.STEPS)):
        found = compile_phase(phase, mesh, times)
        bucket = {**shape._asdict(), "captions": rows if phase.name == "prefill" else total, "caption": caption}
        entry = describe(phase.name, bucket, mesh, found, Flops(times * flops, times * flops), times * nbytes)
        if not found.fits:
            entry["advice"] = "does not fit; fewer slots (--batch) or more devices a replica (--mesh) would help"
        yield entry
        clips = rows if phase.name == "prefill" else total * programs.STEPS / caption
        seconds = seconds + entry["seconds"] / clips if entry["seconds"] is not None else float("nan")
    rate = 3600 / seconds / len(host) if seconds > 0 else None
    yield {"slots": total, "mesh": {"data": shards, "tensor": tensor}, "clips_per_chip_hour": rate}


def _phases(
    model: ThinkerConfig, params: Any, shape: Shape, caption: int, mesh: Mesh, slots: int, rows: int
) -> tuple[Phase, Phase]:
    """`slots.admit` and `slots.advance`, whose window is all of the captions."""
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), rows_sharding(mesh)
    where = model, mesh
    caches = programs.slot_shapes(*where, shape.tokens, slots, caption)
    clips = jax.tree.map(lambda leaf: with_sharding(leaf, by_row), example(model, rows, 1, tuple(shape), 1)[0])
    shards = mesh.shape["data"]
    seed, numbers, index, banned = (
        jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)
        for sizes, dtype in (
            ((), jnp.uint32),
            ((rows,), jnp.int32),
            ((shards, rows // shards), jnp.int32),
            ((model.text.vocab,), jnp.bool_),
        )
    )
    alive = {"parameters": params, "caches": caches, "inputs": clips}
    return (
        Phase("prefill", programs.admit, (caches, params, clips, None, seed, numbers, index, *where), alive),
        Phase("decoding", programs.advance, (caches, params, banned, *where, GREEDY, STOPS, caption), alive),
    )


def _work(model: ThinkerConfig, shape: Shape, caption: int, slots: int, tensor: int) -> tuple[Work, Work]:
    item = jnp.dtype(model.dtype).itemsize
    return prefill_work(model, shape, item, tensor), decoding_work(model, shape, caption, slots, item, tensor)
