"""The programs of a training step for named devices, as shapes: compiled ahead of time, without the devices."""

import os
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.config import GrpoConfig, RunConfig
from avocado_jax.data.pipeline import plan_batches
from avocado_jax.data.plan import Bucket
from avocado_jax.data.prompt import load_habits
from avocado_jax.data.rows import Shape
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import SIZES, ThinkerConfig
from avocado_jax.parallel.backend import use_exact_fp32
from avocado_jax.parallel.batches import process_rows
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.planning.phases import Phase, grpo_phases, sft_phases
from avocado_jax.train.inputs import open_source
from avocado_jax.train.run import make_recipe
from avocado_jax.train.sft import model_of

# Environment of libtpu, read when it loads: no metadata server, no lock on this machine's TPU, few logs.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


GENERATIONS = ("v5e", "v5p", "v6e")  # one device a chip


class Program(NamedTuple):
    """A training step of a run for one bucket of clip shapes.

    Attributes:
        bucket: shape of the clips, and length of the longest caption of the step.
        rows: rows of the step on all devices.
        group: captions per row.
        phases: the programs of the step in execution order; SFT has one.
        hosts: process index -> rows that the process loads.
    """

    config: RunConfig
    bucket: Bucket
    rows: int
    group: int
    model: ThinkerConfig
    mesh: Mesh
    phases: tuple[Phase, ...]
    hosts: dict[int, list[int]]


def devices_of(topology: str | None, slices: int = 1) -> list[Any]:
    """Devices of a TPU slice, described by libtpu, or the devices of this machine.

    Args:
        topology: generation and chips of a slice, as in `v5p:4x4x4`; None for this machine.
        slices: number of such slices.

    Raises:
        InputError: libtpu is missing or does not know the slice.
    """
    if topology is None:
        return jax.devices()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if topology.split(":")[0] not in GENERATIONS:
        raise InputError(f"--topology {topology}: not of {', '.join(GENERATIONS)}, as in v5p:4x4x4")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)
    except Exception as error:  # libtpu raises types of its own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--topology {topology}: {first} (needs libtpu: pip install 'avocado-jax[plan]')") from error


def model_and_buckets(config: RunConfig) -> tuple[ThinkerConfig, list[Bucket]]:
    """Model of the checkpoint `init` and buckets of the data `data.train`, the most expensive bucket first.

    Where the checkpoint or the data do not exist on this machine, `nominal` supplies them.

    Raises:
        InputError: `nominal` is invalid, or an existing checkpoint or data set cannot be read.
    """
    nominal, checkpoint = config.nominal, None
    if config.init and (config.init.startswith(("gs://", "avocado_jax/assets/")) or os.path.exists(config.init)):
        checkpoint = open_checkpoint(config.init)
    elif nominal.model not in SIZES:
        raise InputError(f"nominal.model: {nominal.model!r} is not one of {', '.join(SIZES)}")
    elif len(nominal.clip) != len(Shape._fields) or min(nominal.clip) < 1:
        raise InputError(f"nominal.clip: {nominal.clip} is not {', '.join(Shape._fields)}")
    model = model_of(config, checkpoint.config if checkpoint else SIZES[nominal.model])
    data = config.data
    if checkpoint and (":" in data.train or os.path.exists(data.train)):
        source, reading = open_source(data.train, data)
        words, habits = load_words(checkpoint.config_folder), load_habits(checkpoint.config_folder)
        recipe = make_recipe(config, model, words, reading, habits)
        return model, list(plan_batches(source.index, recipe, config.batch, data.shapes, config.seed).buckets)
    return model, [Bucket(Shape(*nominal.clip), data.caption_tokens)]


def kernel_of(model: ThinkerConfig, platform: str) -> ThinkerConfig:
    """The model with attention "auto" resolved for devices of a platform, which may not be this machine's."""
    kernel = {"tpu": "splash", "gpu": "cudnn" if model.dtype == "bfloat16" else "plain"}
    return replace(model, attention=kernel.get(platform, "plain")) if model.attention == "auto" else model


def program_of(config: RunConfig, model: ThinkerConfig, bucket: Bucket, devices: list[Any]) -> Program:
    """The training step of `config` on `devices`.

    Raises:
        InputError: the mesh does not match the devices or does not divide the rows, or the processes cannot load
            their rows.
    """
    use_exact_fp32(config.dtype)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices, devices)
    model = kernel_of(model, devices[0].platform)
    if isinstance(config, GrpoConfig):
        bucket = bucket._replace(caption=config.sampling.tokens)
        rows, group, make = config.batch * config.split, config.group // config.split, grpo_phases
    else:
        rows, group, make = config.batch, config.data.references, sft_phases
    phases = make(config, model, bucket, mesh)
    return Program(config, bucket, rows, group, model, mesh, phases, rows_of_hosts(mesh, rows))


def rows_of_hosts(mesh: Mesh, rows: int) -> dict[int, list[int]]:
    """Process index -> rows that the process loads.

    Raises:
        InputError: two processes share some of their rows but not all.
    """
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return {process: process_rows(mesh, rows, process) for process in processes}
