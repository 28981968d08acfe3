"""Output of a GRPO run: the size of a step, and warnings when captions collapse."""

import pytest

from avocado_jax.config import GrpoConfig, ObjectiveConfig, RewardConfig, SamplingConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.models.config import SEVEN_B
from avocado_jax.train.health import SAMPLER_GAP, Health, describe

START = {
    "length": 400.0,
    "entropy": 1.0,
    "sampler_gap": 0.01,
    "truncated": 0.1,
    "zero_variance": 0.2,
    "reward_repetition": -0.02,
    "reward_checklist_missing": 0.1,
}
COLLAPSES = {
    "length": (99.0, "captions have 99 tokens, 400 at the start"),
    "entropy": (0.19, "entropy is 0.190 nats per token, 1.000 at the start"),
    "sampler_gap": (2 * SAMPLER_GAP, "sampler_gap 0.100 is above 0.05"),
    "truncated": (0.51, "51% of captions reach sampling.tokens"),
    "zero_variance": (0.9, "90% of groups have equal rewards"),
    "reward_repetition": (-0.2, "20% of captions repeat themselves"),
    "reward_checklist_missing": (0.6, "60% of captions have no R_C"),
    "reward_probes_missing": (0.7, "70% of captions have no score of probes"),
    "reward_timing_missing": (0.8, "80% of captions have no time IoU"),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_warning_is_printed_when_its_condition_begins(capsys, name):
    value, message = COLLAPSES[name]
    health, collapsed = Health(), START | {name: value}
    for step, metrics in enumerate((START, START, collapsed, collapsed, START, collapsed), start=1):
        health.check(step, metrics)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 6"]
    assert all(f"warning: {message}" in line for line in lines)


def test_no_sampler_warning_for_captions_of_an_earlier_policy(capsys):
    health, diverged = Health(), START | {"sampler_gap": 1.0}
    health.check(1, diverged)
    health.check(2, diverged, stale=True)
    health.check(3, diverged)  # still holding
    health.check(4, START)
    health.check(5, diverged, stale=True)
    health.check(6, diverged)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["step 1", "step 6"]


def test_absent_or_unknown_metrics_give_no_warning(capsys):
    health = Health()
    health.check(1, {})
    health.check(2, dict.fromkeys(START, float("nan")))
    assert not capsys.readouterr().err


def test_step_without_rows_is_ignored(capsys):
    health, empty = Health(), dict.fromkeys(START, 0.0) | {"rows": 0.0, "reward_checklist_missing": 1.0}
    for step, metrics in enumerate((empty, START, empty, START | {"length": 90.0, "rows": 4.0}), start=1):
        health.check(step, metrics)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 4: warning: captions have 90 tokens")


def test_start_prints_the_size_of_a_step():
    bucket = Bucket(Shape(28032, 99, 30, 50), 4096)
    config = GrpoConfig(
        batch=8, group=4, sampling=SamplingConfig(tokens=512), rewards=RewardConfig(dialogue=0.5, length=0.0)
    )
    text = describe(config, SEVEN_B, bucket)
    assert "4 captions of each of 8 clips, up to 512 tokens at temperature 1;" in text
    assert "reward: 1 x checklist + 0.5 x dialogue, keypoints judged by lexical" in text
    assert "policy loss of every update is 0" in text
    cost = float(text.split("at most ")[1].split()[0])
    assert cost == pytest.approx(8 * 28032 * 15e9 / 1e15 * 5, rel=0.5)  # rollout, reference, update of 7.6e9 weights

    def loss(**fields):
        return "policy loss" in describe(GrpoConfig(**fields), SEVEN_B, bucket)

    judged = RewardConfig(probes=2.0, probe_judge="remote")
    assert "+ 2 x probes, keypoints judged by lexical, probes answered by remote" in describe(
        GrpoConfig(rewards=judged), SEVEN_B, bucket
    )
    extra = RewardConfig(checklist=0.0, extra=("host:module:mine=0.25", "jax:module:other"))
    assert "1 x length + 0.25 x host:module:mine + 1 x jax:module:other\n" in describe(
        GrpoConfig(rewards=extra), SEVEN_B, bucket
    )
    assert not loss(passes=2)  # the second pass has ratios other than 1
    assert not loss(objective=ObjectiveConfig(aggregate="token"))  # long captions weigh more
