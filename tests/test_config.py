"""Configs: typed overrides, one-line errors, and fields that may change when a run is resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from avocado_jax import config
from avocado_jax.__main__ import main
from avocado_jax.config import DataConfig, SftConfig, as_json, flat, load, refuse_another
from avocado_jax.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("from avocado_jax.config import SftConfig\nconfig = SftConfig(batch=4)\n")
    return str(file)


def test_overrides_have_the_type_of_their_field(path):
    given = ["--data.train", "world:0:train:0:8", "--optim.lr=1e-3", "--steps", "1_000", "--tensorboard", "false"]
    loaded = load(path, [*given, "--profile", "3,5", "--mesh.fsdp=-1"])
    assert loaded.data.train == "world:0:train:0:8"
    assert (loaded.optim.lr, loaded.steps, loaded.tensorboard) == (1e-3, 1000, False)
    assert (loaded.profile, loaded.mesh.fsdp, loaded.batch) == ((3, 5), -1, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--lr", "1"], "did you mean optim.lr?"),
        (["--learningrate", "1"], "did you mean optim.lr?"),
        (["--learning_rate", "1"], "did you mean optim.lr?"),
        (["--tensor", "1"], "did you mean mesh.tensor?"),
        (["--save_steps", "1"], "did you mean checkpoint_every?"),
        (["--output_dir", "run"], "did you mean workdir?"),
        (["--work-dir", "run"], "did you mean workdir?"),
        (["--heldot", "1"], "did you mean data.heldout?"),
        (["--zzz", "1"], "--zzz: no such field; avocado sft --help lists all"),
        (["--steps", "many"], "'many' is not of type int"),
        (["--tensorboard", "maybe"], "not of type bool"),
        (["--steps"], "value is missing"),
        (["--optim", "adam"], "--optim.lr"),
        (["--steps.more", "1"], "has no subfields"),
        (["steps", "1"], "--name value"),
        (["--optim.learning_rate", "1"], "did you mean optim.lr?"),
        (["--checkpoint_minutes", "-1"], "checkpoint_minutes: -1.0 is not a number from 0"),
        (["--checkpoint_minutes", "nan"], "checkpoint_minutes"),
        (["--mesh.rollout_tensor", "2"], "mesh.rollout_tensor: only GRPO has rollouts"),
        (["--profile", "5,3"], "profile: 5,3 is not FIRST,LAST"),
        (["--profile", "0,3"], "profile"),
        (["--data.cache_dir", "gs://bucket/cache"], "data.cache_dir: gs://bucket/cache must be a local folder"),
    ],
)
def test_invalid_overrides_are_one_line_errors(path, given, message):
    with pytest.raises(InputError, match=message) as error:
        load(path, given)
    assert "\n" not in str(error.value)


def test_oversample_is_validated_against_batch():
    with pytest.raises(InputError, match="rollout_batches: 0 is not a number from 1"):
        load("configs/grpo_7b.py", ["--rollout_batches", "0"])
    for clips, why in (("-8", "-8 is not a number from 0"), ("12", "12 clips are not a multiple of batch = 8")):
        with pytest.raises(InputError, match=f"oversample: {why}"):
            load("configs/grpo_7b.py", ["--oversample", clips])
    assert load("configs/grpo_7b.py", ["--oversample", "16"]).oversample == 16


@pytest.mark.parametrize("command", ["grpo", "ablate", "plan"])
def test_a_malformed_term_is_reported_at_once(command, tmp_path, capsys):
    """Before a checkpoint is opened: this one does not exist."""
    out = {"grpo": "--workdir", "ablate": "--out"}
    given = [command, "grpo_world", "--init", str(tmp_path / "no_such")]
    given += [out[command], str(tmp_path / "run")] if command in out else []
    for term, why in {"foo": "a term is jax:", "host:module": "not 'host:module'", "jax:m:f=x": "'x' is not"}.items():
        assert main([*given, "--rewards.extra", f"host:os:getcwd=0.5,{term}"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"avocado {command}: rewards.extra: ")
        assert why in message
        assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_files_without_a_config_are_refused(tmp_path):
    for text, message in (("config = 3", "defines no"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / "bad.py"))
    with pytest.raises(InputError, match="no such config"):
        load(str(tmp_path / "absent.py"))


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    """Files of the working directory take precedence over names beside the package (clone) or inside it (wheel)."""
    there = load(str(CONFIGS[0]))
    monkeypatch.chdir(tmp_path)
    for name in (CONFIGS[0].stem, CONFIGS[0].name, f"configs/{CONFIGS[0].stem}", f"configs/{CONFIGS[0].name}"):
        assert load(name) == there
    with pytest.raises(InputError, match=r"configs with a name: .*sft_7b, .*world_tiny"):
        load("sft_8b")
    for path in ("../configs/sft_7b", "nested/sft_7b", "nested/sft_7b.py"):
        with pytest.raises(InputError, match="no such config file"):
            load(path)
    (tmp_path / "sft_7b").write_text(CONFIGS[0].read_text())
    with pytest.raises(InputError, match="not a Python file"):
        load("sft_7b")
    (tmp_path / "package" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()  # in site-packages: of another package
    (tmp_path / "configs" / "changed.py").write_text(CONFIGS[0].read_text())
    assert load("configs/changed") == there
    (tmp_path / "package" / "configs" / "mine.py").write_text(CONFIGS[0].read_text())
    monkeypatch.setattr(config, "PACKAGE", tmp_path / "package")
    assert load("mine") == there


def test_resume_under_another_config_is_refused():
    stored = json.loads(json.dumps(as_json(SftConfig())))
    refuse_another(SftConfig(), stored, "run")
    refuse_another(load_with(profile=(1, 2), accumulate=4, keep=9), stored, "run")
    del stored["max_skipped"], stored["optim"]["final"]  # fields that are newer than the folder
    refuse_another(SftConfig(), stored, "run")
    with pytest.raises(InputError, match=r"max_skipped \(20 there, 3 here\)"):
        refuse_another(load_with(max_skipped=3), stored, "run")
    other = load_with(batch=64, optim=replace(SftConfig().optim, lr=1.0))
    with pytest.raises(InputError, match=r"batch \(128 there, 64 here\), optim.lr"):
        refuse_another(other, stored, "run")
    with pytest.raises(InputError, match="kind"):
        refuse_another(SftConfig(), stored | {"kind": "GrpoConfig"}, "run")
    with pytest.raises(
        InputError, match=r"steps \(0 there, 9 here\); to train longer, begin another run with --init run"
    ):
        refuse_another(load_with(steps=9), stored, "run")


def test_absolute_and_relative_paths_are_equal_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(**data):
        return load_with(init="base", data=DataConfig(**data))

    stored = json.loads(json.dumps(as_json(of(train="shards", heldout="gs://b/x"))))
    refuse_another(of(train=f"{tmp_path}/shards", heldout="gs://b/x"), stored, "run")
    refuse_another(of(train="./shards/", heldout="gs://b/x"), stored, "run")
    for train, heldout in (("shards2", "gs://b/x"), ("shards", "gs://b/y"), ("shards", "b/x"), ("", "gs://b/x")):
        with pytest.raises(InputError, match="data"):
            refuse_another(of(train=train, heldout=heldout), stored, "run")


def load_with(**fields):
    return replace(SftConfig(), **fields)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_documents_its_command(path):
    assert any(name == "mesh.tensor" for name, *_ in flat(load(str(path))))
    text = path.read_text()
    assert f"configs/{path.name}" in text
    assert "Expected" in text
