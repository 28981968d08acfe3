"""The plans that launchers look up, and the README table that is printed from them."""

from pathlib import Path

import job
import plans
import pytest

ROOT = Path(__file__).parents[2]


def test_readme_table_equals_the_json_file():
    (found,) = plans.TABLE.finditer((ROOT / "launch/README.md").read_text())
    assert found[0] == found[1] + plans.table() + found[2], "run: python launch/plans.py --write"


def test_hours_follow_from_the_steps_of_the_configs():
    """107 thousand captions twice in batches of 128; 2,000 clips once, 8 a step."""
    text = (ROOT / "launch/README.md").read_text()
    for stage, steps in (("sft", 1672), ("grpo", 250)):
        assert plans.steps(f"configs/{stage}_7b.py", []) == steps
        assert f"| {steps:,} steps of " in text
    (sft,) = (line for line in plans.table().splitlines() if "sft_7b.py --topology v5p:4x4x4 --accumulate 2`" in line)
    assert sft.endswith(f"| 18.7 s | compute | 50% | {1672 * 18.7 / 3600:.1f} | {64 * 1672 * 18.7 / 3600:.0f} |")


def test_every_plan_is_found():
    for plan in plans.read_plans():
        wanted = plan["config"], plan["topology"], plan["fields"]
        if plan["fits"]:
            assert f"at most {plan['seconds']} s" in plans.find_plan(*wanted)
        else:
            with pytest.raises(job.InputError, match="does not fit"):
                plans.find_plan(*wanted)
        job.slice_of(plan["topology"])
