"""Compile a phase of a step and report its memory by part, FLOPs, communication and the bound of its time."""

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from avocado_jax.config import GrpoConfig
from avocado_jax.parallel.chips import CHIPS, GIB, Chip
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.planning.phases import Phase
from avocado_jax.planning.program import Program
from avocado_jax.planning.work import Flops, flops_of, residual_bytes, rows_per_device, runs_per_step, traffic_bytes

# Predicted share of a ceiling. The matrix products of a text model's step reached 64% of the measured ceiling of an
# H100, recomputation included (48% MFU under full remat). Not measured on TPUs.
ATTAINED = 0.65
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# Error messages of the TPU compiler for a program that does not fit: total memory, or temporaries only.
_REFUSED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def memory_refused(message: str, arguments: int) -> tuple[int, int] | None:
    """Required and available bytes, if a compiler error is about memory; None for other errors.

    Args:
        message: of the error.
        arguments: bytes of the program's arguments, which some messages leave out.
    """
    if (found := _REFUSED.search(message)) is None:
        return None
    parts = [part for part in found.groups() if part is not None]
    total, limit = (round(float(size) * UNITS[unit]) for size, unit in (parts[:2], parts[2:]))
    return total + arguments * message[found.start() :].startswith("HLO temporaries"), limit


class Times(NamedTuple):
    """Lower bounds of a step's seconds, each from one ceiling of the device."""

    compute: float
    hbm: float
    interconnect: float


def times_of(chip: Chip, devices: int, flops: Flops, nbytes: float, sent: float) -> Times:
    """The bounds of a program.

    Args:
        flops: of all devices.
        nbytes: HBM traffic of one device.
        sent: bytes that one device sends.
    """
    return Times(flops.machine / devices / chip.flops, nbytes / chip.bandwidth, sent / chip.links)


def predicted_seconds(times: Times) -> float:
    """Seconds at ATTAINED of the binding ceiling."""
    return max(times) / ATTAINED


class Compiled(NamedTuple):
    """What compiling a phase shows.

    Attributes:
        hbm: bytes on one device by part, with `temporaries` and `total`.
        traffic: bytes that one device sends, by kind of collective; None if the program is refused.
    """

    hbm: dict[str, int]
    limit: int
    traffic: dict[str, float] | None
    fits: bool
    seconds: float


def compile_phase(phase: Phase, mesh: Mesh, most: int = 1) -> Compiled:
    """Compile a phase. Bytes include all arrays that are alive while it runs, also those that it does not read.

    Args:
        most: assumed trip count of loops whose condition depends on data.
    """
    device = mesh.devices.flat[0]
    hbm = {part: bytes_per_device(tree) for part, tree in phase.alive.items()}
    resident = sum(hbm.values())
    lowered, begun = phase.lower(mesh), time.perf_counter()
    limit, traffic, fits = memory_of(device), None, True
    try:
        compiled, text = _compiled(lowered, device.platform)
    except jax.errors.JaxRuntimeError as error:
        arguments = bytes_per_device([leaf for leaf in jax.tree.leaves(phase.args) if hasattr(leaf, "sharding")])
        if (refused := memory_refused(str(error), arguments)) is None:
            raise
        (total, limit), fits = refused, False
        total += resident - arguments
    else:
        stats = compiled.memory_analysis()
        total = _stored(phase.alive, mesh) + stats.output_size_in_bytes - stats.alias_size_in_bytes
        total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        traffic = collective_bytes(text, most)
        fits = total <= limit
    hbm |= {"temporaries": total - resident, "total": total}
    return Compiled(hbm, limit, traffic, fits, round(time.perf_counter() - begun, 1))


def report(program: Program, phase: Phase) -> dict[str, Any]:
    """Compile a phase and describe it: an entry of `steps` in the output of `plan`.

    FLOPs are of all devices, recomputation included. `seconds` assumes ATTAINED of the binding ceiling; it and `mfu`
    are null where the ceilings of the device are unknown. FLOPs and bytes are of the program, `seconds` are of a step:
    a rollout and its view count once for all steps of the rollout, and spare clips are included.
    """
    shape, caption = program.bucket
    found = compile_phase(phase, program.mesh, caption if phase.name == "rollout" else 1)
    flops = flops_of(program, phase)
    bucket = {**shape._asdict(), "captions": program.group, "caption": caption}
    entry = describe(phase.name, bucket, program.mesh, found, flops, traffic_bytes(program, phase))
    entry["residual_bytes_estimate"] = residual_bytes(program, phase)
    if entry["seconds"] is not None:
        entry["seconds"] *= runs_per_step(program, phase)
    if not found.fits:
        entry["advice"] = _advice(program, phase, entry)
    return entry


def describe(
    name: str, bucket: dict[str, int], mesh: Mesh, found: Compiled, flops: Flops, nbytes: float
) -> dict[str, Any]:
    """An entry of `steps`, without advice.

    Args:
        nbytes: HBM traffic of one device.
    """
    entry: dict[str, Any] = {
        "name": name,
        "bucket": bucket,
        "fits": found.fits,
        "hbm_bytes": found.hbm,
        "hbm_limit_bytes": found.limit,
        "residual_bytes_estimate": 0,
        "flops": flops.machine,
        "collective_bytes": found.traffic,
        "bound": None,
        "seconds": None,
        "mfu": None,
        "compile_seconds": found.seconds,
        "advice": None,
    }
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    if chip and found.traffic is not None:
        times = times_of(chip, mesh.size, flops, nbytes, sum(found.traffic.values()))
        entry["roofline_seconds"] = times._asdict()
        entry["bound"] = max(times._fields, key=lambda name: getattr(times, name))
        entry["seconds"] = predicted_seconds(times)
        entry["mfu"] = flops.model / mesh.size / chip.flops / entry["seconds"]
    return entry


def _advice(program: Program, phase: Phase, entry: dict[str, Any]) -> str:
    """By how much a phase does not fit, and which fields would help, cheapest first."""
    config = program.config
    over = (entry["hbm_bytes"]["total"] - entry["hbm_limit_bytes"]) / GIB
    hbm, shape = entry["hbm_bytes"], program.mesh.shape
    rows, ways = rows_per_device(program, phase), []
    if rows > 1 and phase.name != "view":
        ways.append(f"--accumulate {2 * config.accumulate} halves the {rows} rows that a device processes at once")
    if entry["residual_bytes_estimate"] and program.model.remat in ("none", "dots"):
        ways.append("--remat full keeps only the layers' inputs")
    offloads = program.model.remat != "offload" and program.mesh.devices.flat[0].platform != "cpu"
    if entry["residual_bytes_estimate"] and offloads:
        ways.append("--remat offload keeps the layers' inputs in the host's memory")
    if hbm["parameters"] + hbm["optimizer"] > hbm["total"] / 4 and shape["data"] > 1:
        ways.append(f"--mesh.data 1 --mesh.fsdp {shape['data'] * shape['fsdp']} stores one copy of the state, not more")
    if program.model.text.heads % (2 * shape["tensor"]) == 0:
        ways.append(f"--mesh.tensor {2 * shape['tensor']} divides heads, hidden widths and logits further")
    longest = "sampling.tokens" if isinstance(config, GrpoConfig) else "data.caption_tokens"
    ways.append(f"a larger slice, or a smaller {longest} or clip")
    return f"does not fit by {over:.2f} GiB; what would help: " + "; ".join(ways)


def _stored(tree: Any, mesh: Mesh) -> int:
    """Bytes of a tree on one device, with the padding of its layouts, as the compiler reports them."""
    try:
        with jax.set_mesh(mesh):
            reading = jax.jit(lambda tree: jnp.int32(0), keep_unused=True).lower(tree).compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := memory_refused(str(error), 0)) is None:
            raise
        return refused[0]
    return reading.memory_analysis().argument_size_in_bytes


def _compiled(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """The compiled program and its HLO text. jaxlib cannot print every program of libtpu, so libtpu dumps the text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, written.read_text()


def memory_of(device: Any) -> int:
    """Memory of a device in bytes: from its data sheet, its own report, or a CPU device's share of the machine."""
    if chip := CHIPS.get(device.device_kind):
        return round(chip.memory)
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.devices())
    return int((device.memory_stats() or {})["bytes_limit"])
