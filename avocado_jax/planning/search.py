"""Search over mesh shapes, remat and accumulation of a config on given devices."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any

from avocado_jax.config import GrpoConfig, RunConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.phases import Phase
from avocado_jax.planning.program import Program, program_of
from avocado_jax.planning.report import memory_of, report
from avocado_jax.planning.work import LEARNING, residual_bytes
from avocado_jax.train.state import split

REMATS = tuple(enumerate(("dots", "full", "offload")))  # least recomputation first


def candidates(config: RunConfig, model: ThinkerConfig, devices: int) -> list[RunConfig]:
    """Valid choices for a number of devices, those that are likely fast first.

    Fewer rows per clip mean that fewer copies of it are processed. A smaller `tensor` axis means less communication,
    more accumulation means that weights are gathered more often, and recomputation costs up to a third of the time.

    Raises:
        InputError: no mesh divides the rows.
    """
    found, grpo = [], isinstance(config, GrpoConfig)
    splits = [part for part in range(1, config.group + 1) if config.group % part == 0] if grpo else [1]
    for spread, tensor, accumulate in itertools.product(splits, (1, 2, 4, 8), (1, 2, 4, 8)):
        if devices % (tensor * config.mesh.slices) or model.text.heads % tensor:
            continue
        parts = devices // tensor // config.mesh.slices
        taken = parts * config.mesh.slices * accumulate * (config.minibatches if grpo else 1)
        if config.batch * spread % taken == 0:
            mesh = replace(config.mesh, data=1, fsdp=parts, tensor=tensor)
            one = replace(config, mesh=mesh, accumulate=accumulate, **({"split": spread} if grpo else {}))
            found += [(spread, tensor, number, accumulate, replace(one, remat=remat)) for number, remat in REMATS]
    if not found:
        raise InputError(f"batch: {config.batch} rows: no mesh of {devices} devices divides them")
    return [one for *_, one in sorted(found, key=itemgetter(0, 1, 2, 3))]


def search(
    config: RunConfig, model: ThinkerConfig, bucket: Bucket, devices: list[Any], most: int
) -> Iterator[tuple[RunConfig, list[dict[str, Any]]]]:
    """Compile at most `most` candidates. Yields each with the reports of its phases up to the first that does not fit.

    A candidate is skipped if its arrays, gradients and saved activations alone exceed the memory.
    """
    for one in candidates(config, model, len(devices)):
        if most == 0:
            return
        program = program_of(one, replace(model, remat=one.remat), bucket, devices)
        if max(_least_memory(program, phase) for phase in program.phases) <= memory_of(devices[0]):
            most -= 1
            yield one, reports(program)


def reports(program: Program) -> list[dict[str, Any]]:
    """Reports of the phases in order, up to the first that does not fit."""
    found = []
    for phase in program.phases:
        found.append(report(program, phase))
        if not found[-1]["fits"]:
            break
    return found


def _least_memory(program: Program, phase: Phase) -> int:
    """Lower bound of the memory of one device: arrays, saved activations and gradients."""
    size = bytes_per_device(phase.alive) + residual_bytes(program, phase)
    if phase.name in LEARNING:
        size += bytes_per_device(split(phase.alive["parameters"], program.config.train)[0])  # gradients
    return size
