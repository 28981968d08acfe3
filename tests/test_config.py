"""Configs: overrides by type, mistakes told in one line, what may differ when a run is resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from avocado_jax.config import SftConfig, as_json, flat, load, refuse_another
from avocado_jax.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("from avocado_jax.config import SftConfig\nconfig = SftConfig(batch=4)\n")
    return str(file)


def test_overrides_take_the_type_of_their_field(path):
    given = ["--data.train", "world:0:train:0:8", "--optim.lr=1e-3", "--steps", "1_000", "--tensorboard", "false"]
    config = load(path, [*given, "--profile", "3,5", "--mesh.fsdp=-1"])
    assert config.data.train == "world:0:train:0:8"
    assert (config.optim.lr, config.steps, config.tensorboard) == (1e-3, 1000, False)
    assert (config.profile, config.mesh.fsdp, config.batch) == ((3, 5), -1, 4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--lr", "1"], "did you mean optim.lr?"),
        (["--learningrate", "1"], "did you mean optim.lr?"),
        (["--learning_rate", "1"], "did you mean optim.lr?"),
        (["--tensor", "1"], "did you mean mesh.tensor?"),
        (["--heldot", "1"], "did you mean data.heldout?"),
        (["--zzz", "1"], "--zzz: no such field"),
        (["--steps", "many"], "'many' is not of type int"),
        (["--tensorboard", "maybe"], "not of type bool"),
        (["--steps"], "value is missing"),
        (["--optim", "adam"], "--optim.lr"),
        (["--steps.more", "1"], "no fields of its own"),
        (["steps", "1"], "--name value"),
        (["--checkpoint_minutes", "-1"], "checkpoint_minutes: -1.0 is not a number of minutes"),
        (["--checkpoint_minutes", "nan"], "checkpoint_minutes"),
        (["--profile", "5,3"], "profile: 5,3 is not FIRST,LAST"),
        (["--profile", "0,3"], "profile"),
        (["--data.cache_dir", "gs://bucket/cache"], "data.cache_dir: gs://bucket/cache must be a local folder"),
    ],
)
def test_mistakes_are_told_in_a_line(path, given, told):
    with pytest.raises(InputError, match=told) as error:
        load(path, given)
    assert "\n" not in str(error.value)


def test_a_rollout_has_a_batch():
    with pytest.raises(InputError, match="rollout_batches: 0 is not a number from 1"):
        load("configs/grpo_7b.py", ["--rollout_batches", "0"])


def test_files_that_are_no_config(tmp_path):
    for text, told in (("config = 3", "defines no"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(InputError, match=told):
            load(str(tmp_path / "bad.py"))
    with pytest.raises(InputError, match="no such config"):
        load(str(tmp_path / "absent.py"))


def test_a_run_is_refused_under_another_config():
    held = json.loads(json.dumps(as_json(SftConfig())))
    refuse_another(SftConfig(), held, "run")
    refuse_another(load_with(profile=(1, 2), accumulate=4, keep=9), held, "run")
    other = load_with(batch=64, optim=replace(SftConfig().optim, lr=1.0))
    with pytest.raises(InputError, match=r"batch \(128 there, 64 here\), optim.lr"):
        refuse_another(other, held, "run")
    with pytest.raises(InputError, match="kind"):
        refuse_another(SftConfig(), held | {"kind": "GrpoConfig"}, "run")


def load_with(**fields):
    return replace(SftConfig(), **fields)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_tells_its_command(path):
    config = load(str(path))
    assert any(name == "mesh.tensor" for name, *_ in flat(config))
    text = path.read_text()
    assert f"configs/{path.name}" in text
    assert "Expected" in text
