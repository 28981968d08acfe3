"""Mesh shapes, remat and accumulation for a config on given devices: those that fit, the fastest first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from avocado_jax.config import SftConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.program import Program, program_of
from avocado_jax.planning.report import memory_of, report, residual_bytes
from avocado_jax.train.state import split

REMATS = ("dots", "full", "offload")  # the least recomputation first


def candidates(config: SftConfig, model: ThinkerConfig, devices: int) -> list[SftConfig]:
    """What may be tried on so many devices, in the order of what is likely fast.

    The less is divided over `tensor` the less is sent, and the fewer rows are taken at once the more often weights
    are gathered; recomputation costs up to a third.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        if devices % (tensor * config.mesh.slices) or model.text.heads % tensor:
            continue
        parts = devices // tensor // config.mesh.slices
        mesh = replace(config.mesh, data=1, fsdp=parts, tensor=tensor)
        for accumulate in (1, 2, 4, 8):
            if config.batch % (parts * config.mesh.slices * accumulate) == 0:
                found += [replace(config, mesh=mesh, accumulate=accumulate, remat=remat) for remat in REMATS]
    if not found:
        raise InputError(f"batch: {config.batch} rows are divided over no mesh of {devices} devices")
    return sorted(found, key=lambda one: (one.mesh.tensor, REMATS.index(one.remat), one.accumulate))


def search(
    config: SftConfig, model: ThinkerConfig, bucket: Bucket, devices: list[Any], most: int
) -> Iterator[tuple[SftConfig, dict[str, Any]]]:
    """Compile at most `most` candidates and yield each with its report.

    Those whose state, inputs, gradients and kept activations alone are too much are passed over.
    """
    for one in candidates(config, model, len(devices)):
        if most == 0:
            return
        program = program_of(one, replace(model, remat=one.remat), bucket, devices)
        if _at_least(one, program) <= memory_of(devices[0]):
            most -= 1
            yield one, report(one, program)


def _at_least(config: SftConfig, program: Program) -> int:
    """Bytes of one device that no compiler can save."""
    gradients = bytes_per_device(split(program.state.params, config.train)[0])
    held = bytes_per_device((program.state, program.batch))
    return held + gradients + residual_bytes(config, program)
