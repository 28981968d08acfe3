"""Start a run through its command with expensive functions replaced, and record its calls.

No clip is read, nothing is compiled, no step runs. `Calls` has the arguments that arrive where fields are consumed.
"""

import inspect
from argparse import Namespace
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer import write_tokenizer
from train_runs import ONE_LAYER

from avocado_jax.cli import grpo as cli_grpo
from avocado_jax.cli import sft as cli_sft
from avocado_jax.config import GrpoConfig, SamplingConfig, load
from avocado_jax.data.index import Index
from avocado_jax.data.media import Reading
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.vocabulary import make_table
from avocado_jax.train import grpo, programs, reward_evaluation, rewards, run, run_grpo, sft
from avocado_jax.train.losses import Scores
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.state import State
from avocado_jax.typing import Captions

CLIPS = 7
EMPTY = State(np.int32(0), {}, None, np.int32(0), np.int32(0))
SFT_PROGRAM, GRPO_PROGRAM = run.sft_program, run_grpo.grpo_program
GRPO_OPTIMIZER, ADVANTAGES = grpo.optimizer, run_grpo.advantages
MESH = ("data", "fsdp", "tensor", "slices")


class Stop(Exception):
    """Ends a call of which only the arguments matter."""


class Calls:
    """The arguments that functions receive, by the function's name."""

    def __init__(self, patch):
        self.calls, self.results, self._patch = defaultdict(list), defaultdict(list), patch

    def record(self, module, *names, instead=None):
        for name in names:
            self._record(module, name, getattr(module, name), instead)

    def _record(self, module, name, original, instead):
        signature = inspect.signature(original)

        def call(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            self.calls[name].append(SimpleNamespace(**arguments.arguments))
            self.results[name].append((instead or original)(*args, **kwargs))
            return self.results[name][-1]

        self._patch.setattr(module, name, call)

    def __getattr__(self, name):
        return self.calls[name]


def index():
    column = np.ones(CLIPS, np.int32)
    numbers = np.arange(CLIPS, dtype=np.int32)
    ids = [f"clip-{number}" for number in range(CLIPS)]
    return Index(ids, 2.0 * column, 0 * column, numbers, *(n * column for n in (4, 56, 56, 0, 40, 0)), "byte")


class Clips:
    """Records without media."""

    index = index()

    def __getitem__(self, number):
        fields = {"id": f"clip-{number}", "caption": "a dog"}
        return SimpleNamespace(fields=fields)


def same_tree(begin, shapes):
    """Assert that the initial state of a stage has the tree that its steps take."""
    assert jax.tree.structure(jax.eval_shape(begin, shapes.params)) == jax.tree.structure(shapes)


def begun_sft(*args):
    """`sft_program` with an empty initial state."""
    shapes, step, start = SFT_PROGRAM(*args)
    same_tree(start, shapes)
    return shapes, step, lambda _: EMPTY


def begun_grpo(*args):
    """`grpo_program` with an empty initial state."""
    made = GRPO_PROGRAM(*args)
    same_tree(made.begin, made.state)
    return made._replace(begin=lambda _: EMPTY)


def zero_gradient(loss, trained, batch, accumulate):
    """Zero gradients, from the loss of these rows."""
    totals = jax.eval_shape(loss, trained, *batch)[1]
    return jax.tree.map(jnp.zeros_like, trained), jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), totals)


def some_scores(model, params, clip, encoded, captions, temperature):
    """Fake log-probabilities: all below 0, neighbours differ."""
    values = -0.1 - jnp.abs(jnp.sin(captions.targets + 1.0 + jnp.arange(captions.targets.shape[-1])[None, None]))
    return Scores(values, jnp.ones_like(values), values < 0)


def loss_of(objective, tokens=8):
    """The GRPO loss of some captions, without a model."""
    rng, shape = np.random.default_rng(0), (2, 3, 8)
    targets, lengths = rng.integers(0, 99, shape).astype(np.int32), np.array([[1, 8, 5], [8, 8, 3]])
    captions = Captions(targets, targets, np.arange(8) < lengths[..., None])
    old, reference, sampled = (-rng.exponential(1, shape).astype(np.float32) for _ in range(3))
    rollout = Rollout(captions, sampled, lengths, lengths == 8)
    advantage = rng.normal(size=(2, 3)).astype(np.float32)
    batch = grpo.Experience(None, None, rollout, grpo.Scored(old, reference), advantage, np.ones(2, np.float32))
    config = GrpoConfig(train="all", objective=objective, sampling=SamplingConfig(tokens=tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "gradient", lambda loss, trained, rows, _: (None, loss(trained, *rows)[1]))
        patch.setattr(grpo, "caption_logprobs", some_scores)
        return float(grpo.batch_gradient({}, batch, model=None, config=config)[1])


def empty_rollout(view, clips, *_, sampling, group, split, **__):
    """Captions of zeros with the maximum length."""
    shape = len(clips[0].tokens), group // split, sampling.tokens
    ids, counts = jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], jnp.int32)
    return (Rollout(Captions(ids, ids, ids > 0), jnp.zeros(shape), counts, counts > 0),) * len(clips)


def started(kind, values, folder, patch):
    """The calls of a run of `kind` with these values of its fields."""
    calls = Calls(patch)
    folder.mkdir(exist_ok=True)
    (folder / "config.py").write_text(f"from avocado_jax.config import {kind}\nconfig = {kind}()\n")
    texts = []
    for name, value in values.items():
        texts += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    calls.config = config = load(str(folder / "config.py"), texts)
    checkpoint = SimpleNamespace(config=ONE_LAYER, config_folder=write_tokenizer(folder / "tokenizer", small=True))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    # --- what a run reads and writes
    calls.record(run, "make_mesh", instead=lambda *_: mesh)
    calls.record(run, "open_checkpoint", instead=lambda *_: checkpoint)
    calls.record(run, "open_source", instead=lambda *_: (Clips(), Reading(fewest_pixels=28 * 28)))
    calls.record(run, "begin_run", "batches", "add_adapters", "Log", instead=lambda *_, **__: iter(()))
    calls.record(run, "compile_ahead", "train", "use_exact_fp32", instead=lambda *_: 0)
    calls.record(run, "plan_batches", "train_flops")
    for module in (run, run_grpo):
        calls.record(module, "Checkpoints", instead=lambda *_: SimpleNamespace(latest=lambda: None))
        calls.record(module, "load_sharded", instead=lambda *_, **__: {})
        calls.record(module, "stop_ids", instead=lambda *_: (258,))
    # --- what its programs are made of
    calls.record(programs, "example")
    calls.record(run, "sft_program", instead=begun_sft)
    calls.record(run_grpo, "grpo_program", instead=begun_grpo)
    for module in (sft, grpo):
        calls.record(module, "optimizer", "schedule")
        calls.record(module, "gradient", instead=zero_gradient)
    calls.record(grpo, "caption_logprobs", instead=some_scores)
    calls.record(grpo, "by_parts", "objective")
    calls.record(grpo, "decoding_weights")
    calls.record(grpo, "with_tensor", instead=lambda mesh, _: mesh)
    calls.record(grpo, "roll_out", instead=empty_rollout)
    calls.record(run_grpo, "advantages", "widths", "grpo_flops", "blocks")
    calls.record(reward_evaluation, "batch_programs")
    # --- its rewards
    calls.record(rewards, "open_judge", instead=lambda _, model, *__: nullcontext(SimpleNamespace(probes=model)))
    calls.record(rewards, "make_references", instead=lambda _, records, *__: (np.zeros(len(records)), None))
    calls.record(
        rewards,
        "score_captions",
        instead=lambda _, tokens, lengths, *__: dict.fromkeys((*TERMS, "shout"), lengths * 1.0),
    )
    calls.record(rewards, "caption_texts", instead=lambda path: [])
    calls.record(rewards, "make_rewards", "combine", "_shared", "HostTerm")
    patch.setattr(rewards, "make_table", lambda *_: make_table())
    patch.setattr(rewards, "missing", lambda _: {})

    command, name = (cli_sft, "sft") if kind == "SftConfig" else (cli_grpo, "grpo")
    calls.record(command, "init_distributed", instead=lambda *_: nullcontext())
    patch.setattr(command, "configure_jax", lambda _: None)
    patch.setattr(run, "log_compilations", lambda: None)
    patch.setattr("avocado_jax.parallel.compiled.use_cache", lambda _: None)
    places = dict.fromkeys(("coordinator", "processes", "process", "devices", "print_config"))
    args = Namespace(config=str(folder / "config.py"), workdir=str(folder / "run"), fields=texts, **places)
    assert command.run(args) == 0

    # --- a step, of which only shapes are computed; its FLOPs; an evaluation
    job = calls.train[0].job
    calls.programs = {program.name: program for program in calls.compile_ahead[0].programs}
    step = calls.programs["the step" if name == "sft" else f"update of {config.sampling.tokens} tokens"]
    job.batches(0)
    calls.shapes = step.args[0]
    jax.eval_shape(step.run, *step.args)
    job.flops(SimpleNamespace(bucket=calls.results["plan_batches"][0].buckets[0], padded=0.0), {"length": 3.0})
    if name == "sft":
        for one, result in (("captioner_in_training", None), ("stream", ())):
            patch.setattr(run, one, lambda *_, result=result: result)
        calls.record(run, "caption_records", instead=lambda _, records, *__: ["a caption"] * len(records))
        job.evaluate(EMPTY, 1)
    return calls
