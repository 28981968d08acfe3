"""Arms of an ablation, and the significance of differences between them."""

import numpy as np
import pytest

from avocado_jax.errors import InputError
from avocado_jax.eval.ablation import METRICS, PAPER, base_of, difference, parse_arms, summary, table
from avocado_jax.eval.plots import arms_plot, curves_plot


def results(**values):
    """Metrics of each arm by seed."""
    return {name.replace("_", " "): [dict.fromkeys(METRICS, one) for one in each] for name, each in values.items()}


def test_arms_of_the_paper():
    arms = parse_arms(PAPER)
    assert [(arm.slug, arm.stage, sorted(arm.weights)) for arm in arms] == [
        ("sft", "init", []),
        ("sft_sft", "sft", []),
        ("r_d", "grpo", ["dialogue"]),
        ("r_d_r_c", "grpo", ["checklist", "dialogue"]),
        ("r_d_r_c_r_l", "grpo", ["checklist", "dialogue", "length"]),
    ]
    bases = [base_of(arm, arms) for arm in arms]
    assert [base and base.name for base in bases] == [None, "SFT", "SFT", "R_D", "R_D + R_C"]


def test_parse_arms_and_refuse_invalid_ones():
    (arm,) = parse_arms(["half=checklist:0.5, repetition:2"])
    assert arm.weights == {"checklist": 0.5, "repetition": 2.0}
    (arm,) = parse_arms(["mine=length,jax:some.module:term,host:module:other=0.25"])
    assert (arm.stage, arm.weights) == (
        "grpo",
        {"length": 1.0, "jax:some.module:term": 1.0, "host:module:other": 0.25},
    )
    for wrong, why in {
        "dialogue": "not NAME=",
        "a=speech": "'speech' is not one of",
        "a=length,length": "each once",
        "a=length:x": "'x' is not a weight",
        "a=host:module:term=x": "'x' is not a weight",
        "a=host:module:term,host:module:term=2": "each once",
        "=init": "must be unique",
        "../x": "not NAME=",
    }.items():
        with pytest.raises(InputError, match=why):
            parse_arms([wrong])
    with pytest.raises(InputError, match="must be unique"):
        parse_arms(["a b=init", "A-B=sft"])


def test_differences_are_paired_by_seed():
    base, arm = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.61, 0.99])
    found = difference([{"m": v} for v in arm], [{"m": v} for v in base], "m")
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(np.std(arm - base, ddof=1) / np.sqrt(3))
    assert found.shown
    unpaired = difference([{"m": v} for v in arm], [{"m": v} for v in base[::-1]], "m")
    assert unpaired.mean == pytest.approx(0.1)
    assert not unpaired.shown
    assert difference([{"m": 0.3}, {"m": 0.5}], [{"m": 0.1}], "m").mean == pytest.approx(0.3)  # one base for all
    assert difference([{"m": 0.3}], [{"m": 0.1}], "m")[1:] == (None, False)  # one seed has no standard error


def test_table_shows_the_effect_of_each_arm():
    arms = parse_arms(["SFT=init", "R_D=dialogue", "both=dialogue,length"])
    measured = results(SFT=[0.5], R_D=[0.7, 0.72], both=[0.6, 0.84])
    rows = summary(arms, {"SFT": measured["SFT"], "R_D": measured["R D"], "both": measured["both"]})
    lines = table(rows).splitlines()
    assert lines[0] == "|  | event recall | hallucination | order | Dlg.F1 | RepCol | length |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| SFT",
        "| R_D",
        "| both",
        "| R_D over SFT",
        "| both over R_D",
    ]
    assert lines[2].split(" | ")[1] == "0.500"
    assert lines[3].split(" | ")[1] == "0.710 ± 0.014"
    assert lines[5].split(" | ")[1] == "**+0.210 ± 0.020**"
    assert lines[6].split(" | ")[1] == "+0.010 ± 0.220"


def test_time_iou_has_a_column_if_captions_have_times():
    """An arm without times has 0 of it."""
    arms = parse_arms(["SFT=init", "timing=timing"])
    assert arms[1].weights == {"timing": 1.0}
    measured = results(SFT=[0.5], timing=[0.5, 0.5])
    for seed, one in enumerate(measured["timing"]):
        one["time_iou"] = 0.3 + seed / 100
    lines = table(summary(arms, measured)).splitlines()
    assert lines[0].endswith("| length | time IoU |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["0.000 |", "0.305 ± 0.007 |", "**+0.305 ± 0.010** |"]


def test_users_term_has_a_column():
    arms = parse_arms(["SFT=init", "mine=host:module:mine"])
    measured = results(SFT=[0.5], mine=[0.5, 0.5])
    for one in (*measured["SFT"], *measured["mine"]):
        one["mine"] = 0.25
    lines = table(summary(arms, measured)).splitlines()
    assert lines[0].endswith("| length | mine |")
    assert [line.split(" | ")[-1] for line in lines[2:4]] == ["0.250 |", "0.250 ± 0.000 |"]


def test_plots_are_png_files():
    arms = parse_arms(["SFT=init", "R_D=dialogue"])
    measured = results(SFT=[0.5], R_D=[0.7, 0.72])
    assert arms_plot(arms, {"SFT": measured["SFT"], "R_D": measured["R D"]}).startswith(b"\x89PNG")
    names = ("reward_dialogue", "reward_checklist", "reward_length", "reward_repetition", "length", "kl")
    runs = [[dict.fromkeys(names, step / 10) for step in range(4)] for _ in range(2)]
    assert curves_plot(arms, {"R_D": runs}).startswith(b"\x89PNG")
