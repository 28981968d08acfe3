"""FLOPs, memory traffic and saved activations of a phase, derived from shapes: the compiler does not report them."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from avocado_jax.config import GrpoConfig
from avocado_jax.models.flops import decode_bytes, grpo_flops, text_layer_parameters, train_flops
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.phases import Phase
from avocado_jax.planning.program import Program
from avocado_jax.train.grpo import sampler_mesh
from avocado_jax.train.rollout import prefill_parts, rows_per_clip

LEARNING = ("sft", "update")  # phases with a backward pass


class Flops(NamedTuple):
    """Operations of a phase on all devices.

    Attributes:
        model: required operations, from which MFU is computed.
        machine: executed operations: with recomputation, and with clips encoded once per row of a group.
    """

    model: float
    machine: float


def flops_of(program: Program, phase: Phase) -> Flops:
    """Operations of a phase, for captions of maximal length."""
    config, model, (shape, caption) = program.config, program.model, program.bucket
    if not isinstance(config, GrpoConfig):
        of = (model, shape, program.group, caption, config.train)
        return Flops(*(program.rows * train_flops(*of, recomputed=again) for again in (False, True)))
    updates, beta = config.passes * config.minibatches, config.objective.beta > 0
    together = batches(program, phase)

    rows, group = layout(program, phase)[1:]

    def of_rows(rows: int, group: int, recomputed: bool) -> float:
        every = grpo_flops(model, shape, group, caption, config.train, updates, beta, recomputed)
        return rows * every._asdict().get(phase.name, 0.0)  # a view has no arithmetic

    model_flops = of_rows(together * config.batch, config.group, False)
    return Flops(model_flops, of_rows(rows, group, True))


def batches(program: Program, phase: Phase) -> int:
    """Number of batches that one run of a phase processes, spare ones included."""
    config = program.config
    return config.rollout_batches + config.oversample // config.batch if phase.name in ("view", "rollout") else 1


def runs_per_step(program: Program, phase: Phase) -> float:
    """How often a phase runs in a step: once, once per rollout, or once for each of its batches and spare ones."""
    config = program.config
    if phase.name in ("view", "rollout"):
        return 1 / config.rollout_batches
    if phase.name == "encode":
        return 1 + config.oversample / (config.batch * config.rollout_batches)
    return 1.0


def microbatches(program: Program, phase: Phase) -> int:
    """Number of microbatches that a phase processes sequentially."""
    config = program.config
    if phase.name == "rollout":
        return prefill_parts(config.accumulate, batches(program, phase), _kept(program, phase), config.split)
    return config.accumulate * (config.minibatches if phase.name == "update" else 1)


def layout(program: Program, phase: Phase) -> tuple[Mesh, int, int]:
    """The mesh of a phase, the rows that it processes on all devices, and the captions of each."""
    config, rows = program.config, program.rows * batches(program, phase)
    if phase.name != "rollout":
        return program.mesh, rows, program.group
    kept = _kept(program, phase)
    return sampler_mesh(config, program.mesh), rows // config.split * kept, config.group // kept


def _kept(program: Program, phase: Phase) -> int:
    """The rows of a clip in a rollout."""
    config, mesh = program.config, sampler_mesh(program.config, program.mesh)
    clips, shards = program.rows * batches(program, phase) // config.split, math.prod(mesh.shape[axis] for axis in ROWS)
    return rows_per_clip(clips, config.split, shards * config.accumulate)


def rows_per_device(program: Program, phase: Phase) -> int:
    """Rows of a microbatch on one device."""
    mesh, rows, _ = layout(program, phase)
    return rows // microbatches(program, phase) // math.prod(mesh.shape[axis] for axis in ROWS)


def residual_bytes(program: Program, phase: Phase) -> int:
    """Activations of the language model saved for the backward pass on one device; 0 without a backward pass.

    `remat` selects what is saved of each layer: its input ("full"), nothing on the device ("offload"), its input and
    matrix products ("dots"), or all intermediate values ("none").
    """
    if phase.name not in LEARNING:
        return 0
    text, size = program.model.text, np.dtype(program.model.dtype).itemsize
    rows, tokens = rows_per_device(program, phase), program.bucket.shape.tokens + program.group * program.bucket.caption
    tensor = program.mesh.shape["tensor"]
    heads = (text.heads + 2 * text.kv_heads) * text.head
    products = 2 * text.width + (heads + 2 * text.ffn) / tensor  # outputs of out and down are replicated over tensor
    between = 4 * text.width + (2 * text.heads * text.head + 2 * text.ffn) / tensor
    kept = {
        "full": text.width,
        "offload": 0,
        "dots": text.width + products,
        "none": text.width + products + between,
    }[program.model.remat]
    return round(text.layers * rows * tokens * kept * size)


def traffic_bytes(program: Program, phase: Phase) -> float:
    """Estimate of the HBM traffic of one device in a phase.

    Each pass over each microbatch gathers the weights once and reads them once. An update reads and writes state and
    gradients. Activations count once per write and read of a layer's operations; attention kernels keep scores on the
    chip. A decoded token reads the weights and both KV caches.
    """
    config, model, mesh, (shape, caption) = program.config, program.model, program.mesh, program.bucket
    again = 3 + (model.remat != "none")  # forward, recomputation, gradients of inputs and of weights
    sampled = program.group * caption
    if phase.name == "encode":
        return _towers(program, phase)
    if phase.name == "view":
        (view,) = (one.alive["view"] for one in program.phases if one.name == "rollout")
        return bytes_per_device(phase.args) + (1 + (mesh.shape["fsdp"] > 1)) * bytes_per_device(view)
    if phase.name == "rollout":
        return _text(program, phase, 1, shape.tokens, gathered=False) + caption * _decoding(program, phase)
    if phase.name == "spares":
        return 2 * bytes_per_device(phase.args)
    if phase.name == "score":
        trees = (config.passes * config.minibatches > 1) + (config.objective.beta > 0)
        return _text(program, phase, trees, shape.tokens + sampled)
    passes = config.passes if phase.name == "update" else 1
    updates = microbatches(program, phase) // config.accumulate * passes
    state = bytes_per_device((phase.alive["parameters"], phase.alive["optimizer"]))
    return _text(program, phase, passes * again, shape.tokens + sampled) + 2 * state * updates


def _text(program: Program, phase: Phase, passes: int, tokens: int, gathered: bool = True) -> float:
    """Traffic of `passes` of the language model over all rows, of `tokens` each."""
    text, (mesh, *_), size = program.model.text, layout(program, phase), np.dtype(program.model.dtype).itemsize
    tensor, parts = mesh.shape["tensor"], microbatches(program, phase)
    weights = (text.layers * text_layer_parameters(program.model) + 2 * text.vocab * text.width) * size / tensor
    weights *= 2 if gathered and mesh.shape["fsdp"] > 1 else 1
    activations = rows_per_device(program, phase) * tokens * text.layers * _layer(text.width, text.ffn, tensor) * size
    return passes * parts * (weights + activations)


def _towers(program: Program, phase: Phase) -> float:
    """Traffic of one pass of both encoders over all rows."""
    model, mesh, shape = program.model, program.mesh, program.bucket.shape
    size, tensor, parts = np.dtype(model.dtype).itemsize, mesh.shape["tensor"], microbatches(program, phase)
    vision, audio = model.vision, model.audio
    leaves = jax.tree.leaves([phase.args[0][name] for name in ("vision", "audio")])
    weights = sum(leaf.size for leaf in leaves) * size / tensor * (1 + (mesh.shape["fsdp"] > 1))
    pixels = shape.patches * shape.windows * (vision.window_cells * vision.merge) ** 2
    numbers = pixels * vision.layers * _layer(vision.width, vision.ffn, tensor)
    numbers += shape.chunks * audio.window * audio.layers * _layer(audio.width, audio.ffn, tensor)
    return parts * (weights + rows_per_device(program, phase) * numbers * size)


def _layer(width: int, ffn: int, tensor: int) -> float:
    """Values that a layer writes and reads per token: norms, residual sums, q to out, SwiGLU."""
    return 13 * width + 5 * ffn / tensor


def _decoding(program: Program, phase: Phase) -> float:
    """Traffic of decoding one token of every caption: all rows share one read of the weights."""
    model, (shape, caption) = program.model, program.bucket
    rows, size = rows_per_device(program, phase) * microbatches(program, phase), np.dtype(model.dtype).itemsize
    mesh, _, group = layout(program, phase)
    tensor = mesh.shape["tensor"]
    weights = decode_bytes(model, 0, 0, 0, size)
    less = model.text.layers * text_layer_parameters(model) * (size - 1) if program.config.rollout_int8 else 0
    caches = decode_bytes(model, rows * shape.tokens, rows * group, caption, size) - weights
    return (weights - less) / tensor + caches / min(tensor, model.text.kv_heads)
