"""The grpo command: its files, and bit-identical results after kills."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress

import jax
import numpy as np
import pytest
from train_runs import kill

pytestmark = pytest.mark.slow  # a step has five programs to compile
PROGRAMS = {"encode", "decoding_weights", "view", "roll_out", "score", "grpo_update", "crop", "heldout_totals"}
PROGRAMS |= {"agree", "score_terms", "group_advantages", "admit", "advance", "held_out_rollout"}


def rollouts(runs, name):
    """The bytes of every rollout file."""
    files = sorted((runs.folder / name / "rollouts").iterdir(), key=lambda path: int(path.stem))
    return [path.read_bytes() for path in files]


def assert_same_as_undisturbed(runs, name):
    assert runs.lines(name) == runs.lines("undisturbed")
    assert rollouts(runs, name) == rollouts(runs, "undisturbed")
    jax.tree.map(np.testing.assert_array_equal, runs.files(name), runs.files("undisturbed"))


def test_undisturbed_run_logs_every_step(grpo_runs):
    lines = grpo_runs.lines("undisturbed")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["heldout_reward" in line for line in lines] == [False, False, True, False, True]
    assert all(line["lost"] == line["skipped"] == 0 for line in lines)
    assert all(line["sampler_gap"] < 1e-4 for line in lines)
    assert all(line["kl"] > 1e-6 for line in lines)  # of step 1 too: its second pass follows the first update
    assert lines[0]["update_norm"] > 0 < lines[0]["lr"]
    text = (grpo_runs.folder / "undisturbed" / "metrics.jsonl").read_text()
    perf = [json.loads(line)["perf"] for line in text.splitlines()]
    assert {"rollout_seconds", "score_seconds", "reward_seconds", "update_seconds"} < perf[1].keys()
    phases = [sum(value for name, value in one.items() if name.endswith("_seconds")) for one in perf]
    # Of all steps together: a step's line is written once the rollout of the next one is there.
    assert 0 < sum(phases) <= sum(one["seconds"] for one in perf) + 0.5


def test_rollouts_are_written_with_their_rewards_and_advantages(grpo_runs):
    for number, (text, metrics) in enumerate(zip(rollouts(grpo_runs, "undisturbed"), grpo_runs.lines("undisturbed"))):
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["group"] for line in lines] == [0, 1, 2, 3] * 4
        assert {line["step"] for line in lines} == {number + 1}
        rewards = np.array([line["reward"] for line in lines]).reshape(4, 4)
        for line in lines:
            terms = line["rewards"]
            known = [terms[name] for name in ("checklist", "dialogue", "length") if terms[name] is not None]
            assert line["reward"] == pytest.approx(sum(known), abs=1e-6)
            assert line["length"] == len(line["token_ids"]) <= 24
            assert terms["length"] == pytest.approx(min(1, max(0, (24 - line["length"]) / 16)), abs=1e-6)
        std = np.maximum(rewards.std(axis=1, ddof=1, keepdims=True), 1e-3)
        expected = (rewards - rewards.mean(axis=1, keepdims=True)) / std
        assert np.array([line["advantage"] for line in lines]) == pytest.approx(expected.reshape(-1), abs=1e-5)
        assert metrics["reward"] == pytest.approx(rewards.mean(), abs=1e-6)
        assert metrics["zero_variance"] == np.mean(np.ptp(rewards, axis=1) == 0)
        assert metrics["length"] == pytest.approx(np.mean([line["length"] for line in lines]))


def test_run_resumes_between_updates_of_one_rollout(grpo_runs):
    """Killed after the first of two updates: the captions of the second are those of the policy before the first."""
    fields = ["--steps", "4", "--rollout_batches", "2", "--objective.importance_cap", "2", "--checkpoint_every", "3"]
    grpo_runs.finish("together", *fields)
    lines = grpo_runs.lines("together")
    assert [line["staleness"] for line in lines] == [0, 1, 0, 1]
    assert [line["sampler_gap"] > 1e-4 for line in lines] == [False, True, False, True]
    process = grpo_runs.start("killed-between", *fields)
    while not (grpo_runs.folder / "killed-between" / "checkpoints" / "3").exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert kill(process) == -signal.SIGKILL
    assert not (grpo_runs.folder / "killed-between" / "checkpoints" / "4").exists()
    grpo_runs.finish("killed-between", *fields)
    grpo_runs.finish("killed-between", *fields)  # finished: its last checkpoint can be restored
    assert grpo_runs.lines("killed-between") == lines
    assert rollouts(grpo_runs, "killed-between") == rollouts(grpo_runs, "together")
    jax.tree.map(np.testing.assert_array_equal, grpo_runs.files("killed-between"), grpo_runs.files("together"))


def test_killed_run_with_spare_clips_resumes_exactly(grpo_runs, monkeypatch):
    """The reward is 1 for every fifth caption, so that many groups have equal rewards."""
    use_terms(grpo_runs, monkeypatch)
    rewards = ["--rewards.dialogue", "0", "--rewards.checklist", "0", "--rewards.length", "0"]
    rewards += ["--rewards.extra", "host:my_terms:fifth"]
    fields = [
        "--steps",
        "4",
        "--rollout_batches",
        "2",
        "--oversample",
        "4",
        "--objective.importance_cap",
        "2",
        *rewards,
    ]
    fields += ["--checkpoint_every", "3"]
    grpo_runs.finish("spares", *fields)
    lines = grpo_runs.lines("spares")
    assert sum(line["replaced"] + line["dropped"] for line in lines) > 0
    for line, text in zip(lines, rollouts(grpo_runs, "spares"), strict=True):
        found = [json.loads(one) for one in text.splitlines()]
        groups = {one["id"]: [other["reward"] for other in found if other["id"] == one["id"]] for one in found}
        assert len(groups) == 4 + line["replaced"]
        equal = sum(min(rewards) == max(rewards) for rewards in groups.values())
        assert equal == line["replaced"] + line["dropped"] == 4 * line["zero_variance"]
        assert line["lost"] == 0
        assert line["all_equal"] == (line["dropped"] == 4)
    process = grpo_runs.start("spares-killed", *fields)
    while not (grpo_runs.folder / "spares-killed" / "checkpoints" / "3").exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert kill(process) == -signal.SIGKILL
    grpo_runs.finish("spares-killed", *fields)
    assert grpo_runs.lines("spares-killed") == lines
    assert rollouts(grpo_runs, "spares-killed") == rollouts(grpo_runs, "spares")
    jax.tree.map(np.testing.assert_array_equal, grpo_runs.files("spares-killed"), grpo_runs.files("spares"))
    assert not grpo_runs.compiled_late("spares") & {"replace_groups", "roll_out", "score", "grpo_update"}


TERMS = """
import os
import zlib

def fifth(captions, references):
    return [float(zlib.crc32(text.encode()) % 5 == 0) for text in captions]

def shortness(captions, references):
    return [1 / (1 + len(text)) if len(text) % 3 else None for text in captions]

def e_count(caption, reference):
    return (caption.points == ord("e")).sum() / 100

def fails(captions, references):
    if os.environ["PROCESS"] == "1":
        raise OSError("no such thing")
    return [0.0] * len(captions)
"""


def use_terms(runs, monkeypatch):
    """Make the terms above importable for runs."""
    (runs.folder / "my_terms.py").write_text(TERMS)
    monkeypatch.setenv("PYTHONPATH", f"{runs.folder}:{os.environ.get('PYTHONPATH', '')}")


def test_users_terms_in_runs_of_two_processes(grpo_runs, monkeypatch):
    """Their values are in the rollouts and metrics; a kill changes nothing; an exception ends both processes with 3."""
    use_terms(grpo_runs, monkeypatch)
    fields = ["--rewards.extra", "host:my_terms:shortness=0.5,jax:my_terms:e_count=-1", "--steps", "3"]
    grpo_runs.finish("extra", *fields)
    lines = grpo_runs.lines("extra")
    assert all({"reward_shortness", "reward_e_count_std", "reward_shortness_missing"} < line.keys() for line in lines)
    assert "heldout_reward_shortness" in lines[2]
    for line in map(json.loads, b"".join(rollouts(grpo_runs, "extra")).splitlines()):
        size, value = len(line["caption"]), line["rewards"]["shortness"]
        assert value == (pytest.approx(1 / (1 + size)) if size % 3 else None)
        assert line["rewards"]["e_count"] == pytest.approx(line["caption"].count("e") / 100)
    process = grpo_runs.start("extra-killed", *fields)
    while not (grpo_runs.folder / "extra-killed" / "checkpoints" / "2").exists():
        assert process.poll() is None
        time.sleep(0.02)
    kill(process)
    grpo_runs.finish("extra-killed", *fields)
    assert grpo_runs.lines("extra-killed") == lines
    assert rollouts(grpo_runs, "extra-killed") == rollouts(grpo_runs, "extra")
    monkeypatch.setattr(subprocess, "Popen", numbered_popen(subprocess.Popen))
    log = grpo_runs.finish("fails", "--rewards.extra", "host:my_terms:fails", processes=2, devices=1, expect=3)
    assert "OSError: no such thing" in log
    assert "RuntimeError: the term host:my_terms:fails failed: no such thing" in log
    assert "RuntimeError: the term fails failed on another process" in log


def numbered_popen(popen):
    """Popen that sets the number of the process in the environment."""

    def start(command, env, **options):
        return popen(command, env=env | {"PROCESS": command[command.index("--process") + 1]}, **options)

    return start


@pytest.mark.soak
def test_run_killed_at_random_moments_is_bit_identical(grpo_runs):
    """SIGKILL and SIGTERM over the time of a run: in rollouts, rewards, updates, evaluation and saves."""
    kills = 6
    draw, name, done = random.Random(0), "killed", 0
    start = time.monotonic()
    grpo_runs.finish("timed")
    duration = time.monotonic() - start
    assert_same_as_undisturbed(grpo_runs, "timed")
    while done < kills:
        process = grpo_runs.start(name)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.4, 1.0) * duration)
        if process.poll() is not None:  # it finished before the signal: start another run
            assert process.returncode == 0
            assert_same_as_undisturbed(grpo_runs, name)
            name = f"{name}+"
            continue
        done += 1
        # 0: SIGTERM came in its last step, and it finished; -15: before the first or behind the last handler
        assert kill(process, signal.SIGTERM if done % 2 == 0 else signal.SIGKILL) in (-9, -15, 75, 0)
    grpo_runs.finish(name)
    assert_same_as_undisturbed(grpo_runs, name)


def test_rollouts_of_two_processes_equal_those_of_one(grpo_runs):
    """Each has half of the state and half of the sampler's heads. Nothing is compiled late."""
    grpo_runs.finish("two", "--steps", "2", "--mesh.rollout_tensor", "2", processes=2, devices=1)
    assert not grpo_runs.compiled_late("two") & PROGRAMS
    two, one = (
        [json.loads(line) for line in rollouts(grpo_runs, name)[0].splitlines()] for name in ("two", "undisturbed")
    )
    for first, expected in zip(two, one, strict=True):
        assert first["token_ids"] == expected["token_ids"]
        assert first["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)
        assert first["advantage"] == pytest.approx(expected["advantage"], abs=1e-4)
    assert len(grpo_runs.lines("two")) == 2


def test_another_kind_of_config_is_refused(grpo_runs, runs):
    log = runs.finish("undisturbed", "--group", "4", expect=2)
    assert "--group: no such field" in log
    log = grpo_runs.finish("wrong", "--objective.kl", "k9", expect=2)
    assert "objective.kl: 'k9' is not one of k1, k2, k3" in log
    log = grpo_runs.finish("undisturbed", "--objective.beta", "0.1", expect=2)
    assert "objective.beta (0.04 there, 0.1 here)" in log


def test_steps_compile_nothing(grpo_runs):
    """Real batches have the shapes and shardings that were compiled before step 1."""
    assert not grpo_runs.compiled_late("undisturbed") & PROGRAMS
