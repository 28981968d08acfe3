"""Search over mesh shapes, remat, accumulation and split of a config on given slices."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from avocado_jax.config import GrpoConfig, MeshConfig, RunConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.planning.program import Program, program_of
from avocado_jax.planning.ranking import Estimate, estimates, on_mesh, on_one_device
from avocado_jax.planning.report import memory_of, report


def candidates(config: RunConfig, model: ThinkerConfig, devices: int) -> Iterator[RunConfig]:
    """Valid choices for a number of devices. Those that differ in remat and accumulation only are consecutive.

    The order is that of a search where times cannot be estimated. Fewer rows per clip mean that fewer copies of it are
    processed. A smaller `tensor` axis means less communication, recomputation costs up to a third of the time, and more
    accumulation means that weights are gathered more often.
    """
    grpo = isinstance(config, GrpoConfig)
    grid: dict[str, Any] = {
        "split": [part for part in range(1, config.group + 1) if config.group % part == 0] if grpo else [1],
        "tensor": (1, 2, 4, 8),
        "rollout_tensor": (0, 2, 4, 8) if grpo else (0,),
        "remat": ("dots", "full", "offload"),
        "accumulate": (1, 2, 4, 8),
    }
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values))
        parts, rest = divmod(devices, chosen["tensor"] * config.mesh.slices)
        taken = parts * config.mesh.slices * chosen["accumulate"] * (config.minibatches if grpo else 1)
        if (
            rest
            or not parts
            or config.batch * chosen["split"] % taken
            or chosen["rollout_tensor"] % (2 * chosen["tensor"])
        ):
            continue
        if model.text.heads % max(chosen["tensor"], chosen["rollout_tensor"]):
            continue
        of_mesh = {"data": 1, "fsdp": parts} | {name: chosen.pop(name) for name in grid if hasattr(MeshConfig, name)}
        if not grpo:
            del chosen["split"]
        yield replace(config, mesh=replace(config.mesh, **of_mesh), **chosen)


def varied(config: RunConfig) -> dict[str, Any]:
    """The fields that a search varies, by name."""
    fields = {f"mesh.{name}": getattr(config.mesh, name) for name in ("data", "fsdp", "tensor")}
    fields |= {"remat": config.remat, "accumulate": config.accumulate}
    if isinstance(config, GrpoConfig):
        fields |= {"mesh.rollout_tensor": config.mesh.rollout_tensor, "split": config.split}
    return fields


def rank(config: RunConfig, model: ThinkerConfig, bucket: Bucket, slices: dict[str, list[Any]]) -> list[Estimate]:
    """Estimates of the choices that may fit the memory, those of the fewest chip-seconds per step first.

    Args:
        slices: devices by the name of a slice.

    Raises:
        InputError: no mesh of any slice divides the rows.
    """
    traced = cache(lambda one: on_one_device(one, model, bucket))
    found, tried = [], 0
    for topology, devices in slices.items():
        every = candidates(config, model, len(devices))
        for shared, choices in itertools.groupby(every, lambda one: replace(one, remat="full", accumulate=1)):
            one_device = traced(replace(shared, mesh=MeshConfig()))
            with suppress(InputError):  # processes would share some of their rows but not all
                program = on_mesh(one_device, shared, model, devices)
                tried, found = tried + 1, found + estimates(topology, program, choices)
    if not tried:
        counts = ", ".join(str(len(devices)) for devices in slices.values())
        raise InputError(f"batch: {config.batch} rows: no mesh of {counts} devices divides them")
    possible = (one for one in found if one.least_bytes <= memory_of(slices[one.topology][0]))
    return sorted(possible, key=lambda one: one.rank)


def compile_ranked(
    ranking: list[Estimate], model: ThinkerConfig, bucket: Bucket, slices: dict[str, list[Any]]
) -> Iterator[tuple[Estimate, list[dict[str, Any]]]]:
    """Compile choices. Yields each with the reports of its phases up to the first that does not fit."""
    for one in ranking:
        program = program_of(one.config, replace(model, remat=one.config.remat), bucket, slices[one.topology])
        yield one, reports(program)


def reports(program: Program) -> list[dict[str, Any]]:
    """Reports of the phases in order, up to the first that does not fit."""
    found = []
    for phase in program.phases:
        found.append(report(program, phase))
        if not found[-1]["fits"]:
            break
    return found
