"""Several processes with the same rows agree on lost records, and send each question to the judge once."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from chat import chat_server
from processes import run_connected
from test_judges import encoder  # noqa: F401 (a fixture)
from train_runs import write_checkpoint

ROOT = Path(__file__).parents[2]
IMPORT = f"import sys, json\nsys.path.append({str(ROOT / 'tests' / 'data')!r})\nimport agreement, numpy as np, jax\n"
# Devices of the first and the second half of a host alternate: on two hosts each row is on both, and with `split` the
# rows of a clip are on different ones.
PROGRAM = """
from avocado_jax.remote.chat import Endpoint
from avocado_jax.train.judges import open_judge
from avocado_jax.typing import Probe

folder, url, encoder, lm, *wanted = sys.argv[1:-1]
order = np.arange(jax.device_count()).reshape(2, -1).T.reshape(-1).tolist()
both, apart = dict(sizes=(2, 1, -1), order=order), dict(sizes=(4, 1, -1), order=order, split=2)
models = {"remote": "any", "embedding": encoder, "lm": lm}

def silent(captions, keypoints):  # on the last process
    answers = np.full((len(captions), 4), np.nan if jax.process_index() == jax.process_count() - 1 else 1.0)
    return lambda: answers

found = {}
for name in wanted:
    where = f"{folder}/{name}"
    if name == "learn":
        found[name] = agreement.run_sft_steps({1: [1]}, {0: [1], 1: [1]}, {})
    elif name.startswith("split"):
        lost = {"split none": {}, "split one": {1: [3]}, "split all": {0: [2], 1: [3]}}[name]
        found[name] = agreement.run_grpo_step(where, **apart, lost=lost)
    elif name.startswith("caption_length"):
        found[name] = agreement.run_grpo_step(where, **both, extra=(f"host:agreement:{name}=0.5",))
    elif name.startswith("silent"):
        allowed = 0.3 if name == "silent" else 0.7
        found[name] = agreement.run_grpo_step(where, {"checklist": silent}, **both, max_unjudged=allowed)
    elif name.endswith("probes"):
        kind, probes = name.split()[0], [Probe("Which?", ("one", "two"), number) for number in range(2)]
        with open_judge(kind, models[kind], "float32", Endpoint(url, "any")) as judge:
            judges = {"checklist": judge, "probes": judge.probes}
            found[name] = agreement.run_grpo_step(where, judges, **both, probes=1.0)
            found[f"{name} alone"] = judge.probes([" ", "a dog"], [probes, probes])().tolist()
    else:
        kind, _, lost = name.partition(" ")
        with open_judge(kind, models[kind], "float32", Endpoint(url, "any")) as judge:
            found[name] = agreement.run_grpo_step(where, {"checklist": judge}, **both, lost={1: [0]} if lost else {})
            if kind != "remote":
                found[f"{name} alone"] = judge(["a dog", ""], [["a red cat"], ["a dog", "b"]])().tolist()
print(json.dumps(found))
"""
JUDGED = ("remote", "embedding", "lm")
PROBES = ("remote probes", "lm probes")
HOST_TERMS = ("caption_length", "caption_length_or_failure")
SPLIT = ("split none", "split one", "split all")


def verdict(number, request):
    """An arbitrary verdict that depends only on the question."""
    content = json.loads(request["messages"][1]["content"])
    text = content["description"]
    if "questions" in content:
        labels = {key: sorted(one["choices"]) for key, one in content["questions"].items()}
        numbers = {key: zlib.crc32(f"{text}|{key}".encode()) for key in labels}
        return json.dumps({key: each[numbers[key] % len(each)] for key, each in labels.items()})
    keys = content["statements"].items()
    return json.dumps({key: "yes" if zlib.crc32(f"{text}|{point}".encode()) % 3 else "no" for key, point in keys})


@pytest.fixture(scope="module")
def judges(encoder, tmp_path_factory):  # noqa: F811
    lm = tmp_path_factory.mktemp("lm")
    write_checkpoint(lm)
    return encoder[0], lm


def run(judges, folder, count, devices, *scenarios):
    """Run the processes. Returns their results, the questions in order, and the folder of rollouts."""
    with chat_server(verdict) as server:
        arguments = folder, server.url, *judges, *scenarios
        outputs = run_connected(IMPORT + PROGRAM, count, devices, *arguments, timeout=600, optimization=0)
        found = [json.loads(text.splitlines()[-1]) for text in outputs]
        return found, [request["messages"][1]["content"] for request in server.requests], folder


@pytest.fixture(scope="module")
def two(judges, tmp_path_factory):
    scenarios = ("learn", *SPLIT, *JUDGED, "remote lost", *PROBES, "silent", "silent allowed", *HOST_TERMS)
    return run(judges, tmp_path_factory.mktemp("two"), 2, 2, *scenarios)


def test_record_lost_by_one_process_is_lost_for_all(two):
    learned = [found["learn"] for found in two[0]]
    for one, both, none in learned:
        assert one["metrics"] == both["metrics"]  # to the bit
        assert one["params"] == both["params"]
        assert one["contents"] == both["contents"]  # of the batches, on the devices of this process
        assert [line["rows"] for line in one["metrics"]] == [1, 2]
        assert [line["rows"] for line in none["metrics"]] == [2, 2]
        assert one["metrics"][0]["clip_tokens"] < none["metrics"][0]["clip_tokens"]
        assert one["metrics"][0]["cut"] < none["metrics"][0]["cut"]
        assert one["params"] != none["params"]
    first, second = learned
    for one, other in zip(first, second):
        assert [one[name] for name in ("metrics", "params", "contents")] == [
            other[name] for name in ("metrics", "params", "contents")
        ]


def test_every_process_reports_its_lost_records(two):
    first, second = (found["learn"] for found in two[0])
    (elsewhere,), (here,) = first[0]["lines"], second[0]["lines"]
    name = here.split()[0]
    assert here == f"{name} is lost: took longer than 120 s"
    assert elsewhere == f"{name} is lost: another process could not read it"
    assert first[1]["lines"] == second[1]["lines"] == [here]
    assert first[2]["lines"] == []


def rollouts(folder, name):
    return [json.loads(line) for line in (folder / name / "rollouts" / "1.jsonl").read_text().splitlines()]


def test_clip_of_two_rows_counts_only_if_both_were_read(two):
    (first, second), _, _ = two
    none, one, both = (first[name] for name in SPLIT)
    assert one == both  # metrics and advantages to the bit
    assert first["split one"]["weight"] == second["split one"]["weight"] == [1, 1, 0, 0]
    assert one["advantage"][:2] == none["advantage"][:2]  # the other clip's, as without this one
    assert one["advantage"][2:] == [[0, 0], [0, 0]] != none["advantage"][2:]
    rewards = np.array(none["advantage"][:2])
    assert np.ptp(rewards) > 0.1
    assert one["metrics"]["reward"] != none["metrics"]["reward"]


def test_each_question_is_sent_once_and_all_processes_use_the_answer(two):
    (first, second), questions, folder = two
    questions = [question for question in questions if "statements" in question]
    assert len(questions) == 8 + 4 + 8  # half of the second captions are of a clip that the process that asks has read
    assert len(set(questions[:8])) == 8
    for name in (*JUDGED, "remote lost"):
        assert first[name] == second[name]  # the digest of the local replicas too
    assert first["remote"]["metrics"]["reward_checklist_missing"] == 0
    lines = rollouts(folder, "remote")
    for line in lines:
        questions_sent = [json.loads(text) for text in questions[:8]]
        (statements,) = [one["statements"] for one in questions_sent if one["description"] == line["caption"]]
        verdicts = [zlib.crc32(f"{line['caption']}|{text}".encode()) % 3 > 0 for text in statements.values()]
        assert line["rewards"]["checklist"] == pytest.approx(np.mean(verdicts), abs=1e-6)
    assert len({line["rewards"]["checklist"] for line in lines}) > 1


@pytest.mark.parametrize("name", ["lm", "embedding"])
def test_judges_with_a_model_run_in_a_step_of_two_processes(two, name):
    (first, second), _, folder = two
    assert first[f"{name} alone"] == second[f"{name} alone"]
    assert first[name]["metrics"]["reward_checklist_missing"] == 0
    scores = [line["rewards"]["checklist"] for line in rollouts(folder, name)]
    assert all(0 <= score <= 1 for score in scores)
    if name == "lm":
        assert len(set(scores)) > 1


@pytest.mark.parametrize("name", PROBES)
def test_probes_are_judged_in_a_step_of_two_processes(two, name):
    """Together with keypoints; an empty caption has no right answer."""
    (first, second), _, folder = two
    assert first[name] == second[name]
    assert first[name]["metrics"]["reward_probes_missing"] == 0
    lines = rollouts(folder, name)
    assert [line["rewards"]["checklist"] for line in lines] == pytest.approx(
        [line["rewards"]["checklist"] for line in rollouts(folder, name.split()[0])], abs=1e-5
    )
    for line in lines:
        count = 2 + int(line["id"].split("-")[1]) % 3
        right = count * line["rewards"]["probes"]
        assert right == pytest.approx(round(right), abs=1e-5)
    alone = first[f"{name} alone"]
    assert alone[0] == [0, 0]
    if name == "lm probes":
        assert sum(alone[1]) == 1  # one letter is the likeliest, and right once
    assert alone == second[f"{name} alone"]


def test_missing_answers_end_all_processes(two):
    (first, second), _, _ = two
    assert first["silent"] == second["silent"]
    assert "keypoints of a step without an answer" in first["silent"]["unjudged"]
    assert first["silent allowed"] == second["silent allowed"]
    assert 0.3 < first["silent allowed"]["metrics"]["reward_checklist_missing"] < 0.7


def test_one_process_computes_each_value_of_a_users_term(two):
    (first, second), _, folder = two
    assert first["caption_length"] == second["caption_length"]  # the digest of the local replicas too
    lines = rollouts(folder, "caption_length")
    values = [line["rewards"]["caption_length"] for line in lines]
    assert {value is None for value in values} == {True, False}
    process = {line["id"]: set() for line in lines}
    for line, value in zip(lines, values):
        assert (value is None) == (len(line["caption"]) % 2)
        if value is not None:
            number, length = divmod(value, 100)
            assert length == len(line["caption"])
            process[line["id"]].add(number)
    assert sorted(map(len, process.values())) == [1, 1]
    known = [value for value in values if value is not None]
    assert first["caption_length"]["metrics"]["reward_caption_length"] == pytest.approx(np.mean(known), rel=1e-5)
    assert first["caption_length"]["metrics"]["reward_caption_length_missing"] == values.count(None) / len(values)
    for clip in process:
        of_clip = [line for line in lines if line["id"] == clip]
        mean = np.mean(
            [line["rewards"]["caption_length"] for line in of_clip if line["rewards"]["caption_length"] is not None]
        )
        for line in of_clip:  # without a verdict a caption has the mean of its group
            value = mean if line["rewards"]["caption_length"] is None else line["rewards"]["caption_length"]
            assert line["reward"] == pytest.approx(line["rewards"]["length"] + 0.5 * value, rel=1e-5)


def test_an_exception_in_a_users_term_ends_all_processes(two):
    first, second = (found["caption_length_or_failure"] for found in two[0])
    assert first == {
        "failed": "the term caption_length_or_failure failed on another process: see its output",
        "cause": "NoneType",
    }
    assert second == {
        "failed": "the term host:agreement:caption_length_or_failure failed: no letters",
        "cause": "InputError",
    }


@pytest.mark.slow
def test_rewards_of_one_process_equal_those_of_two(two, judges, tmp_path):
    run(judges, tmp_path, 1, 8, *JUDGED)
    for name in JUDGED:
        for rollout, other in zip(rollouts(tmp_path, name), rollouts(two[2], name), strict=True):
            assert rollout["caption"] == other["caption"]
            for term, value in rollout["rewards"].items():
                assert value == pytest.approx(other["rewards"][term], abs=1e-5)
            assert rollout["advantage"] == pytest.approx(other["advantage"], abs=1e-3)
