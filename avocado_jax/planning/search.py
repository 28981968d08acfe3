"""Mesh shapes, remat and accumulation for a config on given devices: those that fit, the fastest first."""

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

REMATS = tuple(enumerate(("dots", "full", "offload")))  # the least recomputation first


def candidates(config: RunConfig, model: ThinkerConfig, devices: int) -> list[RunConfig]:
    """What may be tried on so many devices, in the order of what is likely fast.

    The fewer rows a clip is spread over the less often it is read; the less is divided over `tensor` the less is
    sent, and the fewer rows are taken at once the more often weights are gathered; recomputation costs up to a third.
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
        raise InputError(f"batch: {config.batch} rows are divided over no mesh of {devices} devices")
    return [one for *_, one in sorted(found, key=itemgetter(0, 1, 2, 3))]


def search(
    config: RunConfig, model: ThinkerConfig, bucket: Bucket, devices: list[Any], most: int
) -> Iterator[tuple[RunConfig, list[dict[str, Any]]]]:
    """Compile at most `most` candidates and yield each with the reports of its phases, up to one that does not fit.

    Those of which what lies there, gradients and kept activations alone are too much are passed over.
    """
    for one in candidates(config, model, len(devices)):
        if most == 0:
            return
        program = program_of(one, replace(model, remat=one.remat), bucket, devices)
        if max(_at_least(program, phase) for phase in program.phases) <= memory_of(devices[0]):
            most -= 1
            yield one, reports(program)


def reports(program: Program) -> list[dict[str, Any]]:
    """Of the phases in turn, until one does not fit."""
    told = []
    for phase in program.phases:
        told.append(report(program, phase))
        if not told[-1]["fits"]:
            break
    return told


def _at_least(program: Program, phase: Phase) -> int:
    """Bytes of one device that no compiler can save."""
    held = bytes_per_device(phase.alive) + residual_bytes(program, phase)
    if phase.name in LEARNING:
        held += bytes_per_device(split(phase.alive["parameters"], program.config.train)[0])  # gradients
    return held
