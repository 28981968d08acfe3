"""Training steps in which some processes cannot read a record. test_agree.py runs them in new processes."""

import hashlib
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from stream_fixtures import recipe

from avocado_jax.config import GrpoConfig, OptimConfig, RewardConfig, SamplingConfig, SftConfig
from avocado_jax.data import pipeline
from avocado_jax.data.index import Index
from avocado_jax.data.media import Media
from avocado_jax.data.pipeline import batches, empty_row, plan_batches
from avocado_jax.data.records import Record
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY
from avocado_jax.parallel.batches import process_rows, rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.rewards.checklist import mean_score
from avocado_jax.rewards.combine import References
from avocado_jax.sampling.generate import Samples
from avocado_jax.train import rewards as run_rewards
from avocado_jax.train.agree import agreed_batches, lost_records
from avocado_jax.train.grpo import GrpoProgram
from avocado_jax.train.rewards import Unjudged, make_rewards
from avocado_jax.train.rollout import as_rollout
from avocado_jax.train.run import Setup, stream
from avocado_jax.train.run_grpo import _step
from avocado_jax.train.sft import model_of, sft_program
from avocado_jax.train.state import State

pipeline._warm = lambda: None  # no clip has sound, and compiling librosa takes seconds
CLIPS = 4
WORDS = ("a dog", "a red cat", "some rain", "one door")


class Clips:
    """Silent clips of random pixels.

    Attributes:
        lost: numbers of records that time out.
    """

    def __init__(self, lost=()):
        self.lost = lost
        column = np.ones(CLIPS, np.int32)
        self.index = Index(
            ids=[f"clip-{number}" for number in range(CLIPS)],
            seconds=2.0 * column,
            shard=0 * column,
            position=np.arange(CLIPS, dtype=np.int32),
            frames=4 * column,
            height=56 * column,
            width=56 * column,
            mel=0 * column,
            caption=40 * column,
            prompt=0 * column,
            unit="byte",
        )

    def __getitem__(self, number):
        if number in self.lost:
            raise TimeoutError("took longer than 120 s")
        frames = np.random.default_rng(number).integers(0, 256, (4, 56, 56, 3)).astype(np.uint8)
        fields = {
            "id": f"clip-{number}",
            "caption": f'Clip {number}: a man says "hello {number}".',
            "keypoints": [{"text": text, "dimension": "static"} for text in WORDS[: 2 + number % 3]],
            "probes": [
                {"question": f"Which is in clip {number}, {text} aside?", "choices": list(WORDS), "answer": text}
                for text in WORDS[: 2 + number % 3]
            ],
        }
        return Record(fields, Media(frames, None, 2.0), fields["id"])


def digest(tree):
    """Digest of the values of a tree of global arrays."""
    whole = multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else tree
    parts = [np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(whole)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def local_digest(tree):
    """Digest of the replicas on the devices of this process."""
    parts = [np.asarray(shard.data).tobytes() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run_sft_steps(*losses):
    """SFT with tensor parallelism over all devices, once for each of `losses`.

    Args:
        losses: process -> the rows of the first batch whose records it loses.

    Returns: of each, metrics of two steps, digests of parameters and of this process's batches, lines on lost records.
    """
    vision = replace(TINY.vision, layers=1, full_layers=(0,))
    config = SftConfig(
        batch=2, dtype="float32", frozen_dtype="float32", remat="none", optim=OptimConfig(lr=1e-2, warmup=0.0)
    )
    model = model_of(config, replace(TINY, vision=vision, text=replace(TINY.text, layers=1)))
    row_recipe = recipe(caption_tokens=24, max_lost_share=1.0, config=model)
    plan = plan_batches(Clips().index, row_recipe, config.batch, 1, 0)
    mesh = make_mesh(1, 1, -1)
    rows = process_rows(mesh, config.batch, jax.process_index())
    with jax.set_mesh(mesh):
        shapes, step, start = sft_program(config, model, mesh, 10)
        return [_sft_metrics(lost, config, row_recipe, plan, mesh, rows, shapes, step, start) for lost in losses]


def _sft_metrics(lost, config, row_recipe, plan, mesh, rows, shapes, step, start):
    source = Clips([int(plan.step(0).records[row]) for row in lost.get(jax.process_index(), [])])
    random = np.random.default_rng(0)
    values = [random.normal(0, 0.1, leaf.shape).astype(leaf.dtype) for leaf in jax.tree.leaves(shapes.params)]
    values = jax.tree.unflatten(jax.tree.structure(shapes.params), values)
    state = start(jax.tree.map(lambda value, leaf: put_global(value, leaf.sharding), values, shapes.params))
    metrics, lines, contents = [], [], []
    for batch in agreed_batches(batches(source, plan, row_recipe, 0, 2, rows), mesh, row_recipe, config.batch):
        contents.append(local_digest((batch.clip, batch.captions, batch.truncated, batch.weight)))
        lines += lost_records(batch, mesh)
        local = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data), (batch.clip, batch.captions))
        for row in np.flatnonzero(np.asarray(batch.weight.addressable_shards[0].data) == 0):
            jax.tree.map(partial(_equal, row), local, empty_row(row_recipe, batch.bucket))
        state, reported = step(state, batch.clip, batch.captions, batch.weight, batch.truncated)
        metrics.append({name: float(value) for name, value in reported.items()})
    return {"metrics": metrics, "params": digest(state.params), "lines": lines, "contents": contents}


def _equal(row, leaf, blank):
    np.testing.assert_array_equal(leaf[row : row + 1], blank)


def put_global(value, sharding):
    """Make a global array from a value that is equal on all processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


class ReferenceCounts(NamedTuple):
    """Replaces array references, which take long to compile."""

    count: np.ndarray


def count_references(table, records, limits, keypoints, features, characters, events):
    """The number of keypoints; every clip has dialogue."""
    counts = np.array([len(record.get("keypoints", ())) for record in records], np.int32)
    return References(ReferenceCounts(np.ones_like(counts)), ReferenceCounts(counts)), None


def score_simply(table, tokens, lengths, references, thresholds=None, answers=None, limits=None, probes=None, extra=()):
    """Replaces `score_captions`, which takes long to compile: the length term and the judges' answers."""
    length = 1 - lengths / 12
    if answers is None:
        checklist = jnp.full(lengths.shape, jnp.nan)
    else:
        checklist = jax.vmap(jax.vmap(mean_score, (0, None)))(answers, references.keypoints.count)
    zero = jnp.zeros(lengths.shape)
    terms = {"checklist": checklist, "dialogue": zero, "length": length, "repetition": zero}
    if probes is not None:
        terms["probes"] = jax.vmap(jax.vmap(lambda scores: mean_score(scores, jnp.int32(len(scores)))))(probes)
    return terms


def caption_length(captions, references):
    """A user's term, which differs between processes: no verdict on odd lengths, else length and process."""
    assert all(len(reference["keypoints"]) > 1 for reference in references)
    return [None if len(text) % 2 else len(text) + 100.0 * jax.process_index() for text in captions]


def caption_length_or_failure(captions, references):
    """Raises an input error on the last process."""
    if jax.process_index() == jax.process_count() - 1:
        raise InputError("no letters")
    return caption_length(captions, references)


def run_grpo_step(folder, judges=None, sizes=(2, 1, -1), order=None, split=1, lost=None, **settings):
    """The GRPO step with a sampler of random letters, simple terms, and an update that keeps its arguments.

    Args:
        sizes, order: of the mesh and of its devices.
        lost: process -> the rows of the first batch whose records it loses.
        settings: of the rewards.

    Returns: advantages and weights that the update received, of all rows; metrics. Or the complaint about the judge.
    """
    config = GrpoConfig(
        batch=2,
        group=4,
        split=split,
        steps=1,
        sampling=SamplingConfig(tokens=12),
        rewards=RewardConfig(low=4, high=12, keypoints=6, lines=2, **settings),
    )
    row_recipe = recipe(group=4, caption_tokens=12, sampled=True, max_lost_share=1.0)
    plan = plan_batches(Clips().index, row_recipe, config.batch, 1, 0)
    source = Clips([int(plan.step(0).records[row // split]) for row in (lost or {}).get(jax.process_index(), [])])
    devices = jax.devices()
    mesh = make_mesh(*sizes, devices=[devices[index] for index in order] if order else devices)
    setup = Setup(mesh, None, TINY, row_recipe.words, source, row_recipe, plan, 1, split)
    random, received = np.random.default_rng(0), []
    tokens = random.integers(65, 91, (config.batch * split, 4 // split, 12)).astype(np.int32)
    lengths = random.integers(4, 13, tokens.shape[:2]).astype(np.int32)
    samples = [put_global(leaf, rows_sharding(mesh)) for leaf in (tokens, np.zeros(tokens.shape, np.float32), lengths)]

    def update(state, experience):
        received.append(experience)
        return state, {"sampler_gap": jnp.zeros(())}

    program = GrpoProgram(
        sampler=None,
        sampler_mesh=None,
        state=None,
        reference=None,
        begin=None,
        encode=None,
        view=lambda params: params,
        roll_out=lambda view, clips, encoded, step, banned: (as_rollout(Samples(*samples), clips[0], (0,)),),
        score=lambda *_: jnp.zeros(()),
        update=update,
    )
    run_rewards.make_table, run_rewards.make_references = lambda *_: (), count_references
    run_rewards.score_captions = score_simply
    with jax.set_mesh(mesh):
        rewards = make_rewards(config, setup, (0,), judges or {})
        step, _ = _step(config, setup, program, rewards, {}, None, (0,), str(folder))
        (batch,) = stream(setup, config, 0, rewards.references)
        try:
            _, metrics, finish = step(State({}, None, jnp.int32(0), jnp.int32(0), jnp.int32(0)), batch)
        except Unjudged as error:
            return {"unjudged": str(error)}
        except RuntimeError as error:
            return {"failed": str(error), "cause": type(error.__cause__).__name__}
        finish()
        kept = {"advantage": received[0].advantage, "weight": batch.weight, "references": batch.references}
        return {
            "advantage": rows_of(received[0].advantage),
            "weight": rows_of(batch.weight),
            "metrics": {name: float(np.nan_to_num(value, nan=-9.0)) for name, value in metrics.items()},
            "local": local_digest(kept),
        }


def rows_of(array):
    """A global array as nested lists."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True)).tolist()
