"""The wheel, the sdist, and the declarations of pyproject.toml."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import files, imports_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*groups):
    return {canonicalize_name(one.name): one for one in (Requirement(text) for group in groups for text in group)}


def test_imports_are_declared():
    known = declared(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    modules = {module for _, path in files() for module in imports_of(path)}
    found = {module.split(".")[0] for module in modules} - {*sys.stdlib_module_names, "avocado_jax", "google"}
    distributions = packages_distributions()
    for name in sorted(found):
        of = {canonicalize_name(one) for one in distributions.get(name, [name])}
        assert of & {*known}, f"{name} of {', '.join(of)}"
    # Several distributions share the package `google`.
    assert {"google-auth", "google-api-core", "google-cloud-core", "google-cloud-storage"} <= {*known}


def test_pinned_versions_satisfy_the_declared_ranges():
    """requirements.txt pins every dependency once, at a version that pyproject.toml permits."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins, ranges = declared(filter(None, lines)), declared(PROJECT["dependencies"])
    assert {*pins} == {*ranges}
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert ranges[name].specifier.contains(exact.version), name


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel that was built from an sdist of this checkout, as pip does."""
    folder = tmp_path_factory.mktemp("dist")

    def build(kind, source):
        command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)

    build("sdist", ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    build("wheel", folder / sdist.name.removesuffix(".tar.gz"))
    return folder


def test_wheel_contains_the_required_files(built):
    (wheel,) = built.glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    package = {name for name in tracked if name.startswith("avocado_jax/") and "/docs/" not in name}
    configs = {f"avocado_jax/{name}" for name in tracked if name.startswith("configs/")}
    assert {name for name in names if name.startswith("avocado_jax/")} == package | configs
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    assert wheel.stat().st_size < 12e6


def test_wheel_runs(built, tmp_path):
    """Outside of the repository: commands, configs by name, the shipped captioner and the prompts of the package."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-P", *command], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import avocado_jax; print(avocado_jax.__file__)").startswith(str(tmp_path))
    assert '"kind": "GrpoConfig"' in run("-m", "avocado_jax", "grpo", "grpo_7b", "--print-config")
    program = """
from avocado_jax.checkpoint.load import open_checkpoint, shipped_checkpoint
from avocado_jax.config import load
print(open_checkpoint(shipped_checkpoint()).config_folder, open_checkpoint(load("world_quick").init).config_folder)
"""
    assert run("-c", program).split() == [str(tmp_path / "site/avocado_jax/assets/captioner")] * 2
