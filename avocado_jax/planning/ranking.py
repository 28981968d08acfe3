"""Estimates of the time and the memory of a step that need no compilation."""

import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig, MeshConfig, RunConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.flops import kv_bytes
from avocado_jax.parallel.chips import CHIPS
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning import work
from avocado_jax.planning.communication import sent_bytes
from avocado_jax.planning.phases import Phase
from avocado_jax.planning.program import Program, kernel_of, program_of, rows_of_hosts
from avocado_jax.planning.report import predicted_seconds, times_of
from avocado_jax.sampling.slots import slot_shardings
from avocado_jax.train.grpo import sampler_mesh
from avocado_jax.train.programs import with_sharding
from avocado_jax.train.state import split


class Estimate(NamedTuple):
    """Of a step.

    Attributes:
        topology: the slice, as --topology takes it.
        seconds: of a step; None where the ceilings of the devices are unknown.
        serial_seconds: of a step, if compute, memory and interconnect did not overlap.
        least_bytes: lower bound of the memory of one device.
    """

    topology: str
    config: RunConfig
    devices: int
    seconds: float | None
    serial_seconds: float
    least_bytes: int

    @property
    def chip_seconds(self) -> float | None:
        """Of a step, over all devices."""
        return None if self.seconds is None else self.devices * self.seconds

    @property
    def rank(self) -> tuple[float | bool, ...]:
        """Orders by chip-seconds to three digits, then "offload" last, whose transfers to the host are not estimated,
        then by chip-seconds without overlap. All estimates are equal where the ceilings are unknown.
        """
        if self.chip_seconds is None:
            return ()
        return float(f"{self.chip_seconds:.3g}"), self.config.remat == "offload", self.devices * self.serial_seconds


def estimates(topology: str, program: Program, choices: Iterable[RunConfig]) -> list[Estimate]:
    """Estimates, by the formulas of `report`, of choices that differ from a program in remat and accumulation only."""
    chip, found = CHIPS.get(program.mesh.devices.flat[0].device_kind), []
    stored = [stored_bytes(program, phase) for phase in program.phases]
    for config in choices:
        one = program._replace(config=config, model=replace(program.model, remat=config.remat))
        seconds = serial = 0.0
        for phase in one.phases if chip else ():
            amounts = work.flops_of(one, phase), work.traffic_bytes(one, phase), sent_bytes(one, phase)
            times, runs = times_of(chip, one.mesh.size, *amounts), work.runs_per_step(one, phase)
            seconds += predicted_seconds(times) * runs
            serial += sum(times) * runs
        more = (work.residual_bytes(one, phase) + cache_bytes(one, phase) for phase in one.phases)
        least = max(map(operator.add, stored, more))
        found.append(Estimate(topology, config, one.mesh.size, seconds if chip else None, serial, least))
    return found


def stored_bytes(program: Program, phase: Phase) -> int:
    """Bytes on one device of the arrays that are alive, and of the gradients."""
    size = bytes_per_device(phase.alive)
    if phase.name in work.LEARNING:
        size += bytes_per_device(split(phase.alive["parameters"], program.config.train)[0])
    return size


def cache_bytes(program: Program, phase: Phase) -> int:
    """Bytes on one device of the KV caches of a rollout."""
    if phase.name != "rollout":
        return 0
    mesh, _, group = work.layout(program, phase)
    rows = work.rows_per_device(program, phase) * work.microbatches(program, phase)
    tokens = rows * (program.bucket.shape.tokens + group * program.bucket.caption)
    return tokens * kv_bytes(program.model, np.dtype(program.model.dtype).itemsize) // mesh.shape["tensor"]


def on_one_device(config: RunConfig, model: ThinkerConfig, bucket: Bucket) -> Program:
    """The step on one device: its shardings name every axis, because a size of 1 divides everything."""
    alone = replace(config, mesh=MeshConfig(data=1, fsdp=1, tensor=1), accumulate=1)
    return program_of(alone, model, bucket, jax.devices()[:1])


def on_mesh(traced: Program, config: RunConfig, model: ThinkerConfig, devices: list[Any]) -> Program:
    """The result of `program_of` without programs to run, in much less time: tracing a 7B model takes half a minute.

    The view in the arguments of a rollout is over the training mesh, which nothing here reads.

    Args:
        traced: of `on_one_device`, for a config that differs in mesh, remat and accumulate only.

    Raises:
        InputError: the mesh does not match the devices, or the processes cannot load their rows.
    """
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.slices, devices)
    sampler = sampler_mesh(config, mesh) if isinstance(config, GrpoConfig) else mesh

    def of_phase(phase: Phase) -> Phase:
        of_sampler = {"view", "slots"}
        alive = {
            part: jax.tree.map(partial(_sharded, sampler if part in of_sampler else mesh), tree)
            for part, tree in phase.alive.items()
        }
        if slots := alive.get("slots"):  # their shardings leave out axes of one device
            alive["slots"] = jax.tree.map(with_sharding, slots, slot_shardings(slots, sampler))
        return Phase(phase.name, None, jax.tree.map(partial(_sharded, mesh), phase.args), alive)

    phases, hosts = tuple(map(of_phase, traced.phases)), rows_of_hosts(mesh, traced.rows)
    model = kernel_of(model, devices[0].platform)
    return traced._replace(config=config, model=model, mesh=mesh, phases=phases, hosts=hosts)


@cache
def _sharded(mesh: Mesh, leaf: Any) -> Any:
    """A shape over another mesh, without the axes that do not divide its sizes."""
    if not hasattr(leaf, "sharding"):
        return leaf

    def divides(axes: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    parts = [axes if divides(axes, size) else None for axes, size in zip(leaf.sharding.spec, leaf.shape)]
    return with_sharding(leaf, NamedSharding(mesh, PartitionSpec(*parts)))
