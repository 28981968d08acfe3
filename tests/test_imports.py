"""Import rules: the layers of the architecture, the needs of the bench, no torch in the product."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "avocado_jax"
LEAVES = {"typing", "errors", "progress", "config", "fields", "jsonl"}
# what a folder may import of the package, itself and the leaves apart
ALLOWED = {
    "models": {"parallel"},
    "parallel": set(),
    "sampling": {"models", "data", "parallel"},
    "checkpoint": {"models", "data.storage", "data.storage_errors", "data.timeouts", "data.hub", "data.ordered"},
    "remote": set(),
    "rewards": set(),
    "rewards/judge.py": {"remote"},  # the one reward that does I/O
    "data": {"models.config", "models.flops"},  # sizes and counts: no device code
    "world": {"models.config"},
    "bench": {"models", "rewards", "sampling", "data", "parallel", "train"},
    "train": {"sampling", "rewards", "remote", "checkpoint", "data", "world", "models", "parallel"},
    "eval": {"sampling", "rewards", "remote", "checkpoint", "data", "world", "models", "parallel"},
    "curation": {"sampling", "rewards", "remote", "checkpoint", "data", "world", "models", "parallel", "eval"},
    "serving": {"sampling", "data"},
    "planning": {"bench", "train", "eval", "sampling", "checkpoint", "data", "models", "parallel"},
    "cli": {
        "planning",
        "train",
        "eval",
        "bench",
        "sampling",
        "rewards",
        "remote",
        "curation",
        "serving",
        "checkpoint",
        "data",
        "world",
        "models",
        "parallel",
    },
}
NUMPY_ONLY = ("data", "world")  # input workers must not start a device runtime
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imports_of(path):
    """All modules that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()  # `from package import x` imports x
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if package else [node.module])


def files():
    """(folder, path) of each file inside a folder of the package."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "docs")  # docs: no part of a wheel
    return [(path.relative_to(PACKAGE).parts[0], path) for path in paths]


def test_imports_follow_the_layers():
    for folder, path in files():
        if path.name == "__main__.py":
            continue
        for module in imports_of(path):
            if not module.startswith("avocado_jax."):
                continue
            inner = module.removeprefix("avocado_jax.")
            first = inner.split(".")[0]
            if first in LEAVES or first == folder:
                continue
            name = path.relative_to(PACKAGE).as_posix()
            # Files of the package itself, its leaves, import leaves only.
            allowed = ALLOWED.get(folder, set()) | ALLOWED.get(name, set())
            assert first in allowed or inner in allowed, f"{name} imports {inner}"


def test_data_and_world_import_no_device_code():
    for folder, path in files():
        sizes = path.relative_to(PACKAGE).as_posix() in ("models/config.py", "models/flops.py")
        if folder in NUMPY_ONLY or sizes or path.parent == PACKAGE:
            found = {module.split(".")[0] for module in imports_of(path)} & DEVICE
            assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_product_imports_no_torch():
    for _, path in files():
        found = {module.split(".")[0] for module in imports_of(path)} & {"torch", "torchvision", "tensorflow"}
        assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_hugging_face_names_occur_only_in_hf_modules():
    for _, path in files():
        if not path.name.startswith("hf"):
            text = path.read_text()
            for name in ("q_proj", "thinker_config", "lm_head", "embed_tokens", "audio_token_index"):
                assert name not in text, f"{path}: {name}"


PATHS = ("prefill", "decode", "sft", "grpo", "rewards", "caption")


@pytest.mark.slow
@pytest.mark.parametrize("paths", [PATHS[:1], PATHS[1:]])
def test_bench_runs_without_the_data_package(paths):
    """jax, flax and numpy are enough: a machine lent for its accelerator need not have the rest."""
    blocked = (
        "av",
        "librosa",
        "grain",
        "tyro",
        "jaxtyping",
        "transformers",
        "orbax",
        "soundfile",
        "tqdm",
        "scipy.signal",
    )
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from avocado_jax.__main__ import main
for what in {paths!r}:
    length = "100" if what == "rewards" else "4"
    shape = ["--group", "2", "--captions", "2", "--clip-tokens", "1024", "--caption-tokens", length]
    assert main(["bench", what, "--size", "tiny", *shape, "--json"]) == 0
"""
    one_device = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=one_device)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"step_ms"') == len(paths)
