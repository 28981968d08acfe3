"""Compile a step and say what it takes: memory by part, work, traffic, and which of them bounds its time."""

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from avocado_jax.config import SftConfig
from avocado_jax.models.flops import kv_bytes, text_layer_parameters, train_flops
from avocado_jax.parallel.chips import CHIPS, GIB
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.planning.program import Program

# The share of a ceiling that a step is predicted to reach. Products of the text model's step reached 64% of an H100's
# measured ceiling, recomputed ones counted (48% model FLOPs under full remat); no TPU was at hand to measure.
ATTAINED = 0.65
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# What the TPU compiler says of a program that does not fit: of all of it, or of its temporaries alone.
_REFUSED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def memory_refused(message: str, held: int) -> tuple[int, int] | None:
    """Bytes that a program needs and may have, if `message` refuses it for that; `held`: of its arguments."""
    if (found := _REFUSED.search(message)) is None:
        return None
    parts = [part for part in found.groups() if part is not None]
    total, limit = (round(float(size) * UNITS[unit]) for size, unit in (parts[:2], parts[2:]))
    return total + held * message[found.start() :].startswith("HLO temporaries"), limit


class Times(NamedTuple):
    """Seconds that a step would take if only one thing took time, at the ceiling."""

    compute: float
    hbm: float
    interconnect: float


def report(config: SftConfig, program: Program) -> dict[str, Any]:
    """Compile `program` and describe it: an entry of `steps` (README, "plan").

    Bytes are those of one device, FLOPs of the whole step with what is recomputed. `seconds` is the bound at
    ATTAINED of its ceiling; it and `mfu` are null where the device's ceilings are not known.
    """
    device, chips = program.mesh.devices.flat[0], program.mesh.size
    chip = CHIPS.get(device.device_kind)
    hbm = {
        "parameters": bytes_per_device(program.state.params),
        "optimizer": bytes_per_device(program.state._replace(params=None)),
        "inputs": bytes_per_device(program.batch),
    }
    held = sum(hbm.values())
    lowered, begun = program.lower(), time.perf_counter()
    limit, traffic, fits = memory_of(device), None, True
    try:
        compiled, text = _compiled(lowered, device.platform)
    except jax.errors.JaxRuntimeError as error:
        if (refused := memory_refused(str(error), held)) is None:
            raise
        (total, limit), fits = refused, False
    else:
        stats = compiled.memory_analysis()
        total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        traffic = collective_bytes(text)
        fits = total <= limit
    hbm |= {"temporaries": total - held, "total": total}

    rows, group, (shape, caption) = config.batch, config.data.references, program.bucket
    model_flops = rows * train_flops(program.model, shape, group, caption, config.train)
    flops = rows * train_flops(program.model, shape, group, caption, config.train, recomputed=True)
    entry: dict[str, Any] = {
        "name": "sft",
        "bucket": {**shape._asdict(), "captions": group, "caption": caption},
        "fits": fits,
        "hbm_bytes": hbm,
        "hbm_limit_bytes": limit,
        "residual_bytes_estimate": residual_bytes(config, program),
        "flops": flops,
        "collective_bytes": traffic,
        "bound": None,
        "seconds": None,
        "mfu": None,
        "compile_seconds": round(time.perf_counter() - begun, 1),
        "advice": None,
    }
    if not fits:
        entry["advice"] = _advice(config, program, entry)
    if chip and traffic is not None:
        times = Times(
            flops / chips / chip.flops,
            traffic_bytes(config, program) / chip.bandwidth,
            sum(traffic.values()) / chip.links,
        )
        entry["roofline_seconds"] = times._asdict()
        entry["bound"] = max(times._fields, key=lambda name: getattr(times, name))
        entry["seconds"] = max(times) / ATTAINED
        entry["mfu"] = model_flops / chips / chip.flops / entry["seconds"]
    return entry


def residual_bytes(config: SftConfig, program: Program) -> int:
    """What the layers of the language model keep for the backward pass, on one device, from shapes.

    The clip's keys and values are kept whatever `remat` is; of each layer its input ("full"), nothing ("offload"), its
    input and products ("dots"), or those and what lies between them ("none").
    """
    text, size = program.model.text, np.dtype(program.model.dtype).itemsize
    rows, tokens = _local(config, program)
    tensor = program.mesh.shape["tensor"]
    heads = (text.heads + 2 * text.kv_heads) * text.head
    products = 2 * text.width + (heads + 2 * text.ffn) / tensor  # out and down are whole on every chip
    between = 4 * text.width + (2 * text.heads * text.head + 2 * text.ffn) / tensor
    kept = {
        "full": text.width,
        "offload": 0,
        "dots": text.width + products,
        "none": text.width + products + between,
    }[program.model.remat]
    clip = rows * program.bucket.shape.tokens * kv_bytes(program.model, size) / min(tensor, text.kv_heads)
    return round(text.layers * rows * tokens * kept * size + clip)


def traffic_bytes(config: SftConfig, program: Program) -> float:
    """Bytes that one device moves between its memory and its cores in a step, about, from shapes.

    Weights in each pass over each part of the batch, once gathered and once read; state and gradients in the update;
    activations as often as the layers' operations write and read them. Kernels keep scores on the chip.
    """
    text, mesh = program.model.text, program.mesh
    rows, tokens = _local(config, program)
    size = np.dtype(program.model.dtype).itemsize
    again = program.model.remat != "none"
    weights = (text.layers * text_layer_parameters(program.model) + 2 * text.vocab * text.width) * size
    weights *= (3 + again) * config.accumulate * (2 if mesh.shape["fsdp"] > 1 else 1) / mesh.shape["tensor"]
    state = 2 * bytes_per_device(program.state)
    a_token = 13 * text.width + 5 * text.ffn / mesh.shape["tensor"]  # forward: norms, residual sums, q to out, SwiGLU
    activations = config.accumulate * rows * tokens * text.layers * a_token * size * (3 + again)
    return weights + state + activations


def _advice(config: SftConfig, program: Program, entry: dict[str, Any]) -> str:
    """By how much a step does not fit, and which fields would help, the cheapest first."""
    over = (entry["hbm_bytes"]["total"] - entry["hbm_limit_bytes"]) / GIB
    hbm, shape = entry["hbm_bytes"], program.mesh.shape
    rows, _ = _local(config, program)
    ways = []
    if rows > 1:
        ways.append(f"--accumulate {2 * config.accumulate} halves the {rows} rows that a device holds at once")
    if program.model.remat in ("none", "dots"):
        ways.append("--remat full keeps only the layers' inputs")
    if program.model.remat != "offload" and program.mesh.devices.flat[0].platform != "cpu":
        ways.append("--remat offload keeps the layers' inputs in the host's memory")
    if hbm["parameters"] + hbm["optimizer"] > hbm["total"] / 4 and shape["data"] > 1:
        ways.append(f"--mesh.data 1 --mesh.fsdp {shape['data'] * shape['fsdp']} stores one copy of the state, not more")
    if program.model.text.heads % (2 * shape["tensor"]) == 0:
        ways.append(f"--mesh.tensor {2 * shape['tensor']} divides heads, hidden widths and logits further")
    ways.append("a larger slice, or a smaller data.caption_tokens or clip")
    return f"does not fit by {over:.2f} GiB; what would help: " + "; ".join(ways)


def _local(config: SftConfig, program: Program) -> tuple[int, int]:
    """Rows that a device holds at once, and the tokens of each, captions too."""
    over = int(np.prod([program.mesh.shape[axis] for axis in ROWS]))
    shape, caption = program.bucket
    return config.batch // config.accumulate // over, shape.tokens + config.data.references * caption


def _compiled(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """The program and its HLO text. jaxlib cannot print all that libtpu compiles, so libtpu writes it itself."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, written.read_text()


def memory_of(device: Any) -> int:
    """Bytes of memory of a device: its data sheet's, what it says itself, or its share of this machine's."""
    if chip := CHIPS.get(device.device_kind):
        return round(chip.memory)
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.devices())
    return int((device.memory_stats() or {})["bytes_limit"])
