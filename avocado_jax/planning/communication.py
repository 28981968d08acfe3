"""Bytes that a device sends in a phase, estimated from shapes: what `collectives.py` reads from a compiled program."""

import math

import jax
import numpy as np

from avocado_jax.models.flops import text_layer_parameters
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.phases import Phase
from avocado_jax.planning.program import Program
from avocado_jax.planning.work import LEARNING, layout, microbatches, rows_per_device


def sent_bytes(program: Program, phase: Phase) -> float:
    """Estimate of the bytes that one device sends in a phase.

    Language model, per microbatch and in the compute dtype: weights are gathered over `fsdp` in the forward and in the
    backward pass (a rollout reads a gathered view), gradients are all-reduced over the rows' axes, and every layer
    all-reduces over `tensor` its two outputs, the gradients of its two inputs, and one output again if it is
    recomputed. Frozen encoders have a forward pass. Embedding lookups, logits and sampled tokens are left out.
    """
    if phase.name == "view":
        (rollout,) = (one for one in program.phases if one.name == "rollout")
        mesh, *_ = layout(program, rollout)
        return bytes_per_device(rollout.alive["view"]) * (1 - 1 / mesh.shape["fsdp"])
    config, model, (shape, caption) = program.config, program.model, program.bucket
    mesh, _, group = layout(program, phase)
    size, tensor = np.dtype(model.dtype).itemsize, mesh.shape["tensor"]
    fsdp, rows = (1 - 1 / shards for shards in (mesh.shape["fsdp"], math.prod(mesh.shape[axis] for axis in ROWS)))
    if phase.name == "spares":
        return bytes_per_device(phase.args) * rows  # replaced rows move to other devices

    def stack(weights: int, numbers: int, learned: bool, passes: int = 1) -> float:
        """Sent by layers of so many weights and, for a row, so many numbers between two layers, all together."""
        of_weights = fsdp * (0 if phase.name == "rollout" else 1 + learned)
        of_weights += 2 * rows * (learned and config.train in ("captioner", "all"))
        summed = 2 + learned * (2 + (model.remat in ("full", "offload")))
        of_rows = summed * 2 * (1 - 1 / tensor) * rows_per_device(program, phase) * numbers
        return passes * microbatches(program, phase) * size * (weights / tensor * of_weights + of_rows)

    vision, audio, text = model.vision, model.audio, model.text
    sent = 0.0
    if phase.name in ("encode", "sft") or config.train == "all":
        towers = phase.args[0] if phase.name == "encode" else phase.alive["parameters"]
        pixels = shape.patches * shape.windows * (vision.window_cells * vision.merge) ** 2
        numbers = pixels * vision.layers * vision.width + shape.chunks * audio.window * audio.layers * audio.width
        weights = sum(leaf.size for name in ("vision", "audio") for leaf in jax.tree.leaves(towers[name]))
        sent += stack(weights, numbers, config.train == "all" and phase.name in LEARNING)
    if phase.name != "encode":
        trees = (config.passes * config.minibatches > 1) + (config.objective.beta > 0) if phase.name == "score" else 1
        passes = config.passes if phase.name == "update" else trees
        weights = text.layers * text_layer_parameters(model) + text.vocab * text.width
        tokens = shape.tokens + group * caption
        sent += stack(weights, tokens * text.layers * text.width, phase.name in LEARNING, passes)
    return sent
