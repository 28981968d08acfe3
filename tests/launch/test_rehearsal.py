"""The pod rehearsal: a host of four is lost in the middle of a run; two go on, and nobody can tell."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rehearse import EPOCHS, RECORDS, STEPS

SCRIPT = Path(__file__).with_name("rehearse.py")
CLOSE = dict(rel=1e-4, abs=1e-6)


def rehearsed(stage, folder):
    """What the rehearsal found; the checks that both stages share are done."""
    done = subprocess.run([sys.executable, SCRIPT, stage, folder], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    told = f"{stage}: {found['seconds_to_detect']} s to detect, {found['seconds_to_recover']} s to the next step"
    print(told, "" if found["apart"] else "(processes, not namespaces)")
    assert found["statuses"] == [75, 75, 75]
    assert found["seconds_to_detect"] < 60
    assert "a host of this job was lost" in found["said"]
    assert 2 <= found["resumed_after"] < STEPS  # from a checkpoint: neither from the beginning nor at the end
    assert [line["step"] for line in found["broken"]] == list(range(1, STEPS + 1))
    return found


def same_curve(found):
    """Every metric of every step, the held-out loss of the last among them."""
    for one, other in zip(found["broken"], found["whole"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], **CLOSE), (one["step"], name)


@pytest.mark.slow
def test_sft_goes_on_with_two_hosts_of_four(tmp_path):
    found = rehearsed("sft", tmp_path)
    same_curve(found)
    assert found["broken"][-1]["heldout_loss"] == pytest.approx(found["whole"][-1]["heldout_loss"], rel=1e-4)
    steps = STEPS // EPOCHS  # every example of an epoch once: all of them have the same tokens together
    clips = [line["clip_tokens"] for line in found["broken"]]
    assert sum(clips[:steps]) == sum(clips[steps:]) > 0


@pytest.mark.slow
def test_grpo_goes_on_with_two_hosts_of_four(tmp_path):
    found = rehearsed("grpo", tmp_path)
    assert re.search(r"step \d", found["said"])
    ids = [[line["id"] for line in step if line["group"] == 0] for step in found["rollouts"]]
    steps = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        seen = [one for step in ids[epoch * steps : (epoch + 1) * steps] for one in step]
        assert len(seen) == len(set(seen)) == RECORDS
