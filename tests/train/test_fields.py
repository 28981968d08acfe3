"""Every config field has an effect: one table of (another value, place of the effect), for SFT and GRPO.

A run starts with all fields changed (started_run.py). Recorded calls show what arrives where a field is consumed; the
objective is evaluated on a few numbers. What the receivers make of it is tested beside them: the optimizer in
test_optim.py, rewards in tests/rewards, the loop in test_loop.py, rows and plans in tests/data, sampling in
tests/sampling.
"""

from dataclasses import replace

import numpy as np
import pytest
from field_effects import (
    cache_dir,
    changes_advantages,
    changes_the_loss,
    drawn,
    epochs,
    extra_terms,
    first_judge,
    frozen_dtypes,
    group,
    heldout_batches,
    in_fine_tuning,
    in_the_update,
    limit_changes_the_loss,
    limits,
    max_unjudged,
    nominal_clip,
    nominal_model,
    observed,
    on_rollouts,
    probes_answered,
    random_numbers,
    reference_dtypes,
    rolled_out,
    rows,
    timeouts,
    trained,
    updates,
    weight,
    world_references,
)
from started_run import CLIPS, MESH, Clips, index, started

from avocado_jax.config import GrpoConfig, SftConfig, flat
from avocado_jax.data.index import Index
from avocado_jax.planning import program as planning
from avocado_jax.train import run


def shared(program, seed=()):
    """Fields of all runs. `program` makes the programs of the stage."""
    return {
        "init": ("elsewhere", "open_checkpoint.reference", "begin_run.init"),
        "seed": (5, "plan_batches.seed", "add_adapters.seed", *seed),
        "steps": (9, "train.job.steps", f"{program}.steps"),
        "epochs": (3.0, epochs),
        "train": ("lora", trained),
        "lora.rank": (3, f"{program}.model.text.lora.rank"),
        "lora.alpha": (5.0, f"{program}.model.text.lora.alpha"),
        "dtype": ("float32", f"{program}.model.dtype", "use_exact_fp32.dtype"),
        "frozen_dtype": ("float32", frozen_dtypes),
        "remat": ("none", f"{program}.model.remat"),
        "attention": ("plain", f"{program}.model.attention"),
        **{
            f"splash.{name}": (1024 + 128 * number, f"{program}.model.splash.{name}")
            for number, name in enumerate(("q", "kv", "q_backward", "kv_backward"), start=1)
        },
        **{f"mesh.{name}": (2 + number, f"make_mesh.{name}") for number, name in enumerate(MESH)},
        "data.train": ("train", lambda calls: [calls.open_source[0].name]),
        "data.heldout": ("heldout", lambda calls: [calls.open_source[1].name]),
        "data.shapes": (2, "plan_batches.shapes"),
        "data.max_lost_share": (0.5, "plan_batches.recipe.max_lost_share"),
        "data.cache_dir": ("cache", cache_dir),
        "data.workers": (3, "batches.workers"),
        "data.threads": (5, "batches.threads"),
        **{
            f"optim.{name}": (value, f"optimizer.config.{name}", f"schedule.config.{name}")
            for name, value in dict(
                lr=0.1, warmup=0.3, final=0.2, beta1=0.7, beta2=0.8, eps=1e-3, weight_decay=0.4, clip_norm=2.0
            ).items()
        },
        "checkpoint_every": (4, "train.job.checkpoint_every"),
        "checkpoint_minutes": (7.0, "train.job.checkpoint_minutes"),
        "keep": (6, "Checkpoints.keep"),
        "eval_every": (8, "train.job.eval_every"),
        "eval_rows": (3, lambda calls: [len(calls.plan_batches[1].index.ids)]),
        "max_skipped": (11, "train.job.max_skipped"),
        "profile": ((2, 3), "train.job.profile"),
        "tensorboard": (False, "Log.tensorboard"),
        "wandb": ("project", "Log.wandb"),
        "nominal.model": ("3b", nominal_model),
        "nominal.clip": ((256, 2, 1, 1), nominal_clip),
        **{
            f"timeouts.{name}": (value, f"init_distributed.timeouts.{name}", timeouts(name))
            for name, value in dict(start=70, heartbeat=80, step=90).items()
        },
    }


FIELDS = {
    "SftConfig": {
        **shared("sft_program"),
        "batch": (6, "plan_batches.batch", "example.rows", lambda calls: [rows(calls)]),
        "accumulate": (2, "gradient.accumulate"),
        "data.references": (3, world_references, "plan_batches.recipe.group", "example.group", "train_flops.group"),
        "data.caption_tokens": (24, "plan_batches.recipe.caption_tokens"),
        "samples": (2, lambda calls: [len(record.records) for record in calls.caption_records]),
        "sample_tokens": (17, "caption_records.length"),
    },
    "GrpoConfig": {
        **shared("grpo_program", ("roll_out.seed", random_numbers)),
        "batch": (6, heldout_batches, lambda calls: [rows(calls) / 2]),
        "accumulate": (2, "gradient.accumulate", "by_parts.parts", "roll_out.parts"),
        "data.references": (3, world_references),
        "data.caption_tokens": (24, in_fine_tuning),
        "group": (4, "plan_batches.recipe.group", "grpo_flops.group", group),
        "mesh.rollout_tensor": (2, "with_tensor.tensor"),
        "split": (2, "roll_out.split", lambda calls: [rows(calls) / 6]),
        "rollout_batches": (
            3,
            lambda calls: [calls.plan_batches[0].together],
            lambda calls: [rolled_out(calls) - 2],
            "blocks.size",
        ),
        "rollout_int8": (
            True,
            lambda calls: [one.model.text.int8 for one in calls.roll_out],
            "decoding_weights.int8",
            "batch_programs.settings.config.text.int8",
        ),
        "oversample": (
            12,
            lambda calls: [6 * calls.plan_batches[0].spares],
            lambda calls: [6 * (rolled_out(calls) - 3)],
            lambda calls: [6 * block.spares for block in calls.blocks],
        ),
        "passes": (5, updates("passes", "minibatches")),
        "minibatches": (3, updates("minibatches", "passes")),
        "reference_dtype": ("float32", reference_dtypes),
        "eval_tokens": (7, "batch_programs.settings.length"),
        "sampling.tokens": (
            10,
            on_rollouts("tokens"),
            drawn("length"),
            "plan_batches.recipe.caption_tokens",
            "widths.limit",
            limits,
            limit_changes_the_loss,
        ),
        "sampling.temperature": (
            0.7,
            on_rollouts("temperature"),
            drawn("sampling", "temperature"),
            "caption_logprobs.temperature",
        ),
        "sampling.top_k": (12, on_rollouts("top_k"), drawn("sampling", "top_k")),
        "sampling.top_p": (0.9, on_rollouts("top_p"), drawn("sampling", "top_p")),
        "objective.advantage": ("mean", changes_advantages("advantage")),
        "objective.std_floor": (0.9, changes_advantages("std_floor")),
        **{
            f"objective.{name}": (value, in_the_update(name), changes_the_loss(name))
            for name, value in dict(
                ratio="sequence",
                clip_low=0.1,
                clip_high=0.3,
                kl="k1",
                beta=0.5,
                aggregate="token",
                importance_cap=1.5,
                mask_overlong=True,
            ).items()
        },
        **{
            f"rewards.{name}": (value, weight(name))
            for name, value in dict(
                checklist=0.5, dialogue=0.6, length=0.7, repetition=0.8, timing=0.9, probes=0.95
            ).items()
        },
        "rewards.extra": (("jax:field_effects:shout=0.3", "host:field_effects:known=-0.2"), extra_terms),
        "rewards.normalize": (True, "combine.normalize"),
        "rewards.gate": (True, "combine.gate"),
        "rewards.low": (11, "score_captions.thresholds.length_low"),
        "rewards.high": (22, "score_captions.thresholds.length_high"),
        "rewards.covered_low": (0.1, "score_captions.thresholds.low"),
        "rewards.covered_high": (0.9, "score_captions.thresholds.high"),
        "rewards.keypoints": (5, "make_references.keypoints", lambda calls: [calls._shared[0].limit]),
        "rewards.questions": (3, lambda calls: [calls._shared[1].limit]),
        "rewards.lines": (6, "make_references.limits.quotes", "score_captions.limits.quotes"),
        "rewards.scenes": (7, "make_references.events"),
        "rewards.judge": ("remote", lambda calls: [calls.open_judge[0].name]),
        "rewards.judge_model": ("model", first_judge("model"), first_judge("endpoint", "model")),
        "rewards.probe_judge": ("remote", lambda calls: [calls.open_judge[1].name]),
        "rewards.probe_model": ("other", lambda calls: [calls.open_judge[1].model], probes_answered),
        "rewards.merge": (True, "make_references.limits.merge", "score_captions.limits.merge"),
        "rewards.long_units": (False, "score_captions.thresholds.long_units"),
        "rewards.idf": ("idf.jsonl", "caption_texts.path"),
        "rewards.judge_url": ("https://judge/v1", "open_judge.endpoint.url"),
        "rewards.judge_cache": ("answers", lambda calls: [str(one.endpoint.cache) for one in calls.open_judge]),
        "rewards.judge_patience": (7.0, "open_judge.endpoint.patience"),
        "rewards.max_unjudged": (0.25, max_unjudged),
    },
}
KINDS = {"SftConfig": SftConfig, "GrpoConfig": GrpoConfig}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Calls of a run of each kind, made on first use. Replaced functions stay replaced in this module."""
    made, folder = {}, tmp_path_factory.mktemp("fields")
    with pytest.MonkeyPatch.context() as patch:

        def calls(kind):
            if kind not in made:
                patch.undo()
                values = {name: value for name, (value, *_) in FIELDS[kind].items()}
                made[kind] = started(kind, values, folder / kind, patch)
            return made[kind]

        yield calls


@pytest.mark.parametrize("kind", FIELDS)
def test_table_of_effects_has_every_field(kind):
    defaults = {name: value for name, value, _ in flat(KINDS[kind]())}
    if kind == "SftConfig":
        del defaults["mesh.rollout_tensor"]  # refused (tests/test_config.py)
    assert FIELDS[kind].keys() == defaults.keys()
    assert not [name for name, (value, *where) in FIELDS[kind].items() if value == defaults[name] or not where]


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields])
def test_a_field_has_its_effect(runs, kind, field):
    value, *places = FIELDS[kind][field]
    for path in places:
        found = observed(runs(kind), path)
        assert found, path  # it was called
        assert all(one == value for one in found), (path, found)


@pytest.mark.parametrize("kind", FIELDS)
def test_checkpoints_are_ranked_by_the_held_out_metric(runs, kind):
    """The lowest loss or the highest reward is best."""
    rank = runs(kind).train[0].job.rank
    if kind == "SftConfig":
        assert rank({"heldout_loss": 1.0}) < rank({"heldout_loss": 2.0})
    else:
        assert rank({"heldout_reward": 2.0}) < rank({"heldout_reward": -1.0})
    assert rank({}) is None


def test_held_out_clips_are_captioned_in_one_batch(runs, monkeypatch):
    """One row each, at least 64 at a time if available, in parts with the rows of a training step."""
    calls = runs("GrpoConfig")
    many = Clips()
    many.index = Index(*(np.tile(column, 40) if isinstance(column, np.ndarray) else column for column in index()))
    many.index = many.index._replace(ids=[f"clip-{number}" for number in range(40 * CLIPS)])
    setup = run.set_up(calls.config, 2)
    monkeypatch.setattr(run, "open_source", lambda *_: (many, setup.recipe.reading))
    for eval_rows, batch, split, expected in ((128, 8, 2, 64), (30, 8, 2, 32), (1, 8, 2, 16), (128, 48, 2, 96)):
        config = replace(calls.config, eval_rows=eval_rows, batch=batch, split=split)
        found = run.heldout(config, setup._replace(split=split))
        assert (found.plan.batch, found.split) == (expected, 1)
        assert found.steps == -(-eval_rows // expected)


def test_the_plan_of_grpo_does_not_depend_on_reference_captions(runs, monkeypatch):
    """It does not depend on fields that may change when a run is resumed, either."""
    calls = runs("GrpoConfig")
    setup = run.set_up(calls.config, 2)
    longer = Clips()
    longer.index = index()._replace(caption=np.arange(CLIPS, dtype=np.int32) * 300)
    monkeypatch.setattr(run, "open_source", lambda *_: (longer, setup.recipe.reading))
    other = run.set_up(replace(calls.config, split=1, accumulate=1), 1)
    assert other.plan.digest == setup.plan.digest
    assert {bucket.caption for bucket in other.plan.buckets} == {64}  # 10 tokens, aligned
    np.testing.assert_array_equal(other.plan.needs, setup.plan.needs)
    more = run.set_up(replace(calls.config, group=8), 2)
    assert (more.plan.needs > setup.plan.needs).all()
    assert planning.make_recipe(calls.config, setup.model, setup.words, setup.recipe.reading) == setup.recipe
