"""The pod rehearsal: one of four hosts is lost, two hosts resume, and the results are those of an undisturbed run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rehearse import EPOCHS, RECORDS, STEPS

SCRIPT = Path(__file__).with_name("rehearse.py")
CLOSE = dict(rel=1e-4, abs=1e-6)
# The programs of a step that run on all hosts together.
PROGRAMS = {
    "sft": {"jit_agree", "jit_step", "jit_batch_totals"},
    "grpo": {"jit_agree", "jit_encode", "jit_decoding_weights", "jit_roll_out", "jit_score", "jit_grpo_update"},
}


def run_rehearsal(stage, folder):
    """Run the rehearsal, run the checks that both stages share, and return the findings."""
    done = subprocess.run([sys.executable, SCRIPT, stage, folder], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    seconds = ", ".join(f"{value} s to {name[11:]}" for name, value in found.items() if name.startswith("seconds_to_"))
    print(f"{stage}: {seconds}", "" if found["namespaces"] else "(processes without namespaces)")
    assert found["orders"] == {"4": [0, 1, 2, 3] * 2, "2": [0, 1] * 2}  # no host has consecutive devices
    assert found["statuses"] == [75, 75, 75]
    assert found["seconds_to_detect"] < 60
    assert "a host of this job was lost" in found["log"]
    assert 2 <= found["resumed_after"] < found["continued_after"] < STEPS  # from checkpoints, not from the start
    assert [line["step"] for line in found["broken"]] == list(range(1, STEPS + 1))
    compilations = [line["perf"]["compilations"] for line in found["broken"]]
    assert min(compilations[: found["resumed_after"]]) > 0
    assert set(compilations[found["continued_after"] :]) == {0}  # all programs were in the cache of the bucket
    first, second = found["cache_misses"]["again"], found["cache_misses"]["second"]
    assert PROGRAMS[stage] <= set(first[0])
    assert second[0] == []
    # Process 0 alone writes: other processes compile the operations on their own devices again, each in milliseconds.
    assert not PROGRAMS[stage] & set(second[1])
    return found


def assert_same_metrics(found):
    """Compare all metrics of all steps, including the held-out loss."""
    for one, other in zip(found["broken"], found["whole"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"perf"}:
            assert one[name] == pytest.approx(other[name], **CLOSE), (one["step"], name)


@pytest.mark.slow
def test_sft_resumes_with_two_of_four_hosts(tmp_path):
    found = run_rehearsal("sft", tmp_path)
    assert_same_metrics(found)
    assert found["broken"][-1]["heldout_loss"] == pytest.approx(found["whole"][-1]["heldout_loss"], rel=1e-4)
    steps = STEPS // EPOCHS
    clips = [line["clip_tokens"] for line in found["broken"]]
    epochs = {sum(clips[first : first + steps]) for first in range(0, STEPS, steps)}
    assert len(epochs) == 1  # each epoch has every example once, hence the same number of tokens
    assert epochs.pop() > 0


@pytest.mark.soak  # eight minutes
def test_grpo_resumes_with_two_of_four_hosts(tmp_path):
    found = run_rehearsal("grpo", tmp_path)
    assert re.search(r"step \d", found["log"])
    ids = [[line["id"] for line in step if line["group"] == 0] for step in found["rollouts"]]
    steps = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        ids_of_epoch = [one for step in ids[epoch * steps : (epoch + 1) * steps] for one in step]
        assert len(ids_of_epoch) == len(set(ids_of_epoch)) == RECORDS
