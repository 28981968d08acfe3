"""The domain and the description of every config field."""

import inspect
import math
from dataclasses import is_dataclass

import pytest

from avocado_jax import config
from avocado_jax.config import GrpoConfig, SftConfig, flat, load
from avocado_jax.errors import InputError
from avocado_jax.fields import AXES, BOUNDS, CHOICES, check_field, describe, field_help

FIELDS = {name: value for kind in (SftConfig, GrpoConfig) for name, value, _ in flat(kind())}
TEXTS = {
    "init",
    "wandb",
    "data.train",
    "data.heldout",
    "data.cache_dir",
    *(f"rewards.{name}" for name in ("judge_model", "judge_url", "judge_cache", "probe_model", "idf")),
}  # any text


def test_every_field_has_a_domain():
    assert {*CHOICES, *BOUNDS, *AXES} <= {*FIELDS}
    for name, value in FIELDS.items():
        check_field(name, value)
        if isinstance(value, str):
            assert (name in CHOICES) != (name in TEXTS), name
        elif isinstance(value, int | float) and not isinstance(value, bool):
            wrong = [math.nan, math.inf] if isinstance(value, float) else []
            wrong += [] if BOUNDS.get(name, (0,))[0] == -math.inf else [type(value)(-2)]
            for other in wrong:
                with pytest.raises(InputError, match=f"^{name}: "):
                    check_field(name, other)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("--remat=yes", "remat: 'yes' is not one of none, dots, full, offload"),
        ("--dtype=fp16", "dtype: 'fp16' is not one of float32, bfloat16"),
        ("--batch=0", "batch: 0 is not a number from 1"),
        ("--steps=-1", "steps: -1 is not a number from 0"),
        ("--optim.warmup=2", "optim.warmup: 2.0 is not a number from 0 to 1"),
        ("--data.caption_tokens=0", "data.caption_tokens: 0 is not a number from 1"),
        ("--mesh.fsdp=0", "mesh.fsdp: 0 is neither -1"),
        ("--rewards.checklist=nan", "rewards.checklist: nan is not a finite number"),
    ],
)
def test_values_out_of_their_domain_are_refused(field, message):
    with pytest.raises(InputError, match=message):
        load("grpo_7b", [field])
    load("grpo_7b", ["--rewards.checklist=-1", "--mesh.fsdp=-1", "--mesh.tensor=1", "--optim.warmup=1"])


def test_choices_equal_those_of_the_code():
    from avocado_jax.models.config import ATTENTION, REMAT, SIZES
    from avocado_jax.rewards.combine import JUDGES, PROBE_JUDGES
    from avocado_jax.train.state import TRAINED

    for name, known in {
        "attention": ATTENTION,
        "remat": REMAT,
        "rewards.judge": JUDGES,
        "rewards.probe_judge": PROBE_JUDGES,
        "train": TRAINED,
    }.items():
        assert {*CHOICES[name]} == {*known}, name
    assert {*CHOICES["nominal.model"]} <= {*SIZES}


@pytest.mark.parametrize("kind", [SftConfig, GrpoConfig])
def test_every_field_is_described(kind):
    made = {one.name: one for one in describe(kind())}
    assert {name for name in made if not name.endswith(".")} == {name for name, *_ in flat(kind())}
    assert all(one.meaning for one in made.values())
    assert {one.name for one in made.values() if not one.kind} == {
        f"{name}." for name, value in vars(kind()).items() if is_dataclass(value)
    }
    assert made["optim.lr"] == ("optim.lr", "float", str(kind().optim.lr), "peak learning rate")
    assert (made["profile"].kind, made["nominal.clip"].default) == ("int,...", "28032,99,30,50")
    assert made["batch"].meaning == "clips per step, over all devices"
    # A field that a subclass declares again without a comment has that of its parent.
    assert "checkpoint_every: int = free(50)\n" in inspect.getsource(config.GrpoConfig)
    assert made["checkpoint_every"].meaning == "steps between two checkpoints"


def test_help_lists_all_fields(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    text = field_help(GrpoConfig())
    assert max(map(len, text.splitlines())) <= 90
    for name, value, _ in flat(GrpoConfig()):
        assert f"  --{name} " in text
        if isinstance(value, bool):
            assert f"  --{name} BOOL = {str(value).lower()} " in text
