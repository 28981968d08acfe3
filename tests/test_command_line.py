"""Output of the command line that needs no command to run."""

import json
import shlex
import subprocess
from importlib.metadata import version

import pytest

from avocado_jax.__main__ import COMMANDS, main
from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.config import DataConfig, GrpoConfig, SftConfig, as_json, flat, load
from avocado_jax.errors import InputError
from avocado_jax.train.inputs import open_source


def printed(capsys, *arguments, status=0):
    """Run a command that returns or exits through argparse. Returns its output."""
    try:
        found = main([*arguments])
    except SystemExit as ended:
        found = ended.code
    assert found == status
    return capsys.readouterr()


def test_version(capsys):
    text = printed(capsys, "--version").out
    for name in ("avocado-jax", "jax", "jaxlib", "flax", "transformers"):
        assert f"{name} {version(name)}" in text
    assert "python 3." in text


@pytest.mark.parametrize(("command", "kind"), [("sft", SftConfig), ("grpo", GrpoConfig)])
def test_help_of_training_lists_all_fields(capsys, command, kind):
    text = printed(capsys, command, "--help").out
    assert all(f"  --{name} " in text for name, *_ in flat(kind()))


def test_print_config(capsys):
    text = printed(capsys, "sft", "sft_7b", "--print-config", "--optim.lr", "3e-4").out
    assert json.loads(text) == json.loads(json.dumps(as_json(load("sft_7b", ["--optim.lr", "3e-4"]))))
    assert json.loads(printed(capsys, "grpo", "grpo_7b", "--print-config").out)["kind"] == "GrpoConfig"
    assert "--workdir RUN" in printed(capsys, "grpo", "grpo_7b", status=2).err


def test_completion_in_bash(capsys, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(printed(capsys, "--print-completion", "bash").out)
    (tmp_path / "clip.mp4").touch()

    def completed(*words):
        """Completions of the shell for the last word of a line."""
        line = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
        program = f'source "{script}"; {line}; _shtab_avocado; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.stdout.split()

    assert {*COMMANDS} <= {*completed("avocado", "")}
    assert "--workdir" in completed("avocado", "sft", "--work")
    assert "--optim.lr" in completed("avocado", "sft", "--optim.l")
    assert "clip.mp4" in completed("avocado", "caption", "cli")
    assert "one of bash" in printed(capsys, "--print-completion", "cmd", status=2).err


def test_unknown_option_names_the_help_of_its_command(capsys):
    assert "unrecognized arguments: --bogus 4 (see avocado caption --help)" in (
        printed(capsys, "caption", "a.mp4", "--bogus", "4", status=2).err
    )


def test_manifest_as_training_data_is_refused_with_advice(capsys, tmp_path):
    config = DataConfig()
    with pytest.raises(InputError, match=r"make them with: avocado prepare data.jsonl OUT"):
        open_source("data.jsonl", config)
    table = tmp_path / "data.csv"
    table.write_text("video,caption\na.mp4,hello\n")
    assert main(["prepare", str(table), str(tmp_path / "shards")]) == 2
    error = capsys.readouterr().err
    assert '{"id": "a", "video": "a.mp4", "caption": "A man ..."}; line 1: not JSON' in error
    assert not (tmp_path / "shards").exists() or not any((tmp_path / "shards").rglob("*.json"))


def test_checkpoint_inside_a_run_is_refused_with_advice(tmp_path):
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    for inside in ("run/checkpoints/5", "run/checkpoints/5/", "run/checkpoints"):
        with pytest.raises(InputError, match=f"part of a run; name the run, {tmp_path}/run,"):
            open_checkpoint(f"{tmp_path}/{inside}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "other" / "checkpoints" / "5")
