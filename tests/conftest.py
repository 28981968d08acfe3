"""Every annotated function on arrays has its shapes and types checked while the tests run."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"  # read by qwen_omni_utils when it is imported
# Eight devices; less optimised code, since nearly all of a test is compilation.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)

from jaxtyping import install_import_hook

CHECKED = ("models", "sampling", "checkpoint", "data", "parallel")  # where arrays have axes
install_import_hook([f"avocado_jax.{folder}" for folder in CHECKED], "typechecked.check")

import torch  # noqa: E402

torch.set_num_threads(2)

from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list) -> None:
    """Training first: its files are the longest, and a long one at the end would leave the other core idle."""
    items.sort(key=lambda item: item.path.parent.name != "train")


def pytest_sessionfinish() -> None:
    """decord and array_record in one process crash it: the reference's reader has its own (reference_clips.py)."""
    assert "decord" not in sys.modules
