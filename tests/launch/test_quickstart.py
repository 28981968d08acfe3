"""quickstart.sh: its commands, recorded by fakes, and the comparison of captions that it prints."""

import importlib
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import compare_captions
import pytest
from fake_run import references

from avocado_jax.__main__ import main
from avocado_jax.config import load
from avocado_jax.train.inputs import open_source

ROOT = Path(__file__).parents[2]
RECORD = """#!/bin/sh
printf "%s\\n" "${0##*/}" "$@" "" >>calls
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """`quickstart(option)` returns the folder, the words of each command of the script, and its output."""

    @cache
    def run(*options):
        folder = tmp_path_factory.mktemp("clone")
        for name in ("launch", ".venv/bin", "runs/quickstart"):
            (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "quickstart.sh", folder / "launch")
        (folder / "launch" / "environment.sh").write_text("")  # installs nothing
        for name in ("avocado", "python"):
            (folder / ".venv" / "bin" / name).write_text(RECORD)
            (folder / ".venv" / "bin" / name).chmod(0o755)
        command = ["bash", str(folder / "launch" / "quickstart.sh"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        calls = (folder / "calls").read_text().removesuffix("\n\n").split("\n\n")
        return folder, [call.split("\n") for call in calls], done.stdout

    return run


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_commands_of_the_quickstart_are_valid(options, quickstart, monkeypatch):
    """Every option exists, every config loads, and every evaluated checkpoint was trained or ships."""
    monkeypatch.chdir(ROOT)
    _, calls, _ = quickstart(*options)
    parsed, trained, captions = [], set(), set()
    for program, *words in calls:
        if program == "python":
            assert {word.partition("=")[2] for word in words if "=" in word} <= captions
            continue
        module = importlib.import_module(f"avocado_jax.cli.{words[0]}")
        monkeypatch.setattr(module, "run", lambda args: parsed.append(args) or 0)
        assert main(words) == 0
        args = parsed[-1]
        if words[0] in ("sft", "grpo"):
            config = load(args.config, args.fields)
            assert config.init in trained or (ROOT / config.init / "config.json").is_file()
            trained.add(args.workdir)
        elif words[0] == "evaluate":
            assert args.checkpoint in {None, "avocado_jax/assets/captioner_habits", *trained}
            captions.add(args.out)
        elif words[0] == "view":
            assert args.folder in trained
    assert len(trained) == (3 if options else 2)


def test_both_trainings_start_from_the_captioner_with_faults():
    """Their data has one shape, and no reference caption exceeds the trained length."""
    sft, grpo = load("quickstart_sft"), load("quickstart_grpo")
    assert sft.init == grpo.init == "avocado_jax/assets/captioner_habits"
    for config in (sft, grpo):
        source, _ = open_source(config.data.train, config.data)
        assert len(source.index.ids) == config.steps * config.batch
        assert config.data.shapes == 1
    assert grpo.rewards.high == grpo.sampling.tokens


def test_usage_and_unknown_options():
    def run(option):
        return subprocess.run(["bash", ROOT / "launch" / "quickstart.sh", option], capture_output=True, text=True)

    assert run("--help").returncode == 0
    assert "--full" in run("--help").stdout
    wrong = run("--fast")
    assert (wrong.returncode, wrong.stderr) == (2, "quickstart.sh: no such option: --fast (see --help)\n")


def test_quickstart_ends_with_the_page_and_next_commands(quickstart):
    folder, _, shown = quickstart()
    assert f"{folder}/runs/quickstart/quick_grpo/report.html" in shown
    assert "avocado caption runs/quickstart/unseen/clips/*.mp4" in shown


def write_captions(path, texts):
    path.write_text("".join(json.dumps({"id": name, "caption": text}) + "\n" for name, text in texts))
    return str(path)


@pytest.fixture
def truth(tmp_path):
    """Eight clips; empty captions, and captions that equal the truth except for the first four clips."""
    records = [reference | {"video": f"clips/{reference['id']}.mp4"} for reference in references(8)]
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    none = write_captions(tmp_path / "none.jsonl", [(record["id"], "") for record in records])
    half = [(record["id"], "" if number < 4 else record["caption"]) for number, record in enumerate(records)]
    # The newest line counts.
    some = write_captions(tmp_path / "half.jsonl", [(name, "Nothing.") for name, _ in half] + half)
    return path, none, some


def test_captions_are_compared_clip_by_clip(truth, monkeypatch, capsys):
    path, none, some = truth
    monkeypatch.setattr("sys.argv", ["compare", str(path), f"before={none}", f"after={some}"])
    compare_captions.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["8", "clips", "before", "after"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    # Four differences of 0 and four of 1: the standard deviation is sqrt(8 / 7 / 4), the error that over sqrt(8).
    assert rows["event_recall"] == ["0.000", "0.500", "+0.500", "±", "0.378", "beyond", "noise"]
    assert rows["hallucination"] == ["0.000", "0.000", "+0.000", "±", "0.000", "within", "noise"]


def test_captions_are_shown_beside_the_truth(truth, monkeypatch, capsys):
    path, _, some = truth
    record = json.loads(path.read_text().splitlines()[4])
    monkeypatch.setattr("sys.argv", ["compare", str(path), "--show", "5", f"caption={some}"])
    compare_captions.main()
    *_, video, reference, caption = capsys.readouterr().out.splitlines()
    text = " ".join(record["caption"].split())
    assert video == str(path.parent / record["video"])
    assert (reference, caption) == (f"  truth:   {text}", f"  caption: {text}")


def test_a_clip_without_a_caption_is_an_error(truth, tmp_path, monkeypatch):
    path, none, _ = truth
    one = write_captions(tmp_path / "one.jsonl", [(json.loads(path.read_text().splitlines()[0])["id"], "A.")])
    monkeypatch.setattr("sys.argv", ["compare", str(path), f"before={none}", f"after={one}"])
    with pytest.raises(SystemExit, match="no caption of 7 clips"):
        compare_captions.main()
