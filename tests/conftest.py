"""Set-up of test processes: simulated devices, run-time shape checks, bounded memory maps, stack dumps.

A process maps each program that XLA compiles for the CPU into memory. Linux allows 65,530 maps (vm.max_map_count);
past that, LLVM cannot allocate memory and the process dies of a segmentation fault inside `backend_compile_and_load`.
So compiled programs are dropped behind each module, as in the product where a module compiles many, and the summary
reports the peaks. `python tests/measure_maps.py` shows the growth.

Nearly all of a test is compilation. The test processes share a persistent cache in .cache/xla, so a program that
several modules need is compiled once, and a second run of the suite reads nearly all of them.
"""

import faulthandler
import gc
import os
import resource
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"  # read by qwen_omni_utils when it is imported
# Eight devices; less optimised code, since nearly all of a test is compilation.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",  # compiles large programs in half of the time
    )
)

from jaxtyping import install_import_hook

CHECKED = ("models", "sampling", "checkpoint", "data", "parallel")  # where arrays have axes
install_import_hook([f"avocado_jax.{folder}" for folder in CHECKED], "typechecked.check")

import jax  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from avocado_jax.parallel.programs import bound_compiled_programs, memory_maps  # noqa: E402

torch.set_num_threads(2)
jax.config.update("jax_numpy_rank_promotion", "raise")  # broadcasts between ranks are written out
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

PEAKS = pytest.StashKey[dict[str, dict[str, float]]]()  # of each test process, by its name
SAVED = "/jax/compilation_cache/compile_time_saved_sec"

if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # in this process only: subprocesses have caches of their own
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def pytest_configure(config: pytest.Config) -> None:
    """SIGUSR1, which launch/test.sh sends at its time limit, prints the stacks of every thread."""
    config.stash[PEAKS] = {}
    config.stash[PEAKS]["this process"] = peaks = {"maps": 0, "GiB": 0.0, "read": 0, "saved": 0.0}
    bound_compiled_programs()

    def count_saved(event: str, seconds: float, **_: object) -> None:
        if event == SAVED:
            peaks["read"], peaks["saved"] = peaks["read"] + 1, peaks["saved"] + seconds

    jax.monitoring.register_event_duration_secs_listener(count_saved)
    faulthandler.register(signal.SIGUSR1, file=os.dup(sys.__stderr__.fileno()), all_threads=True)


def pytest_collection_modifyitems(items: list) -> None:
    """Run the modules in tests/train first: they take longest, and a long one at the end leaves the other core idle."""
    items.sort(key=lambda item: item.path.parent.name != "train")


@pytest.fixture(scope="module", autouse=True)
def _release_programs(request: pytest.FixtureRequest):
    """Drop the compiled programs of a module, and record the peak number of maps, which only grows in a module."""
    yield
    peaks = request.config.stash[PEAKS]["this process"]
    peaks["maps"] = max(peaks["maps"], memory_maps())
    peaks["GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    jax.clear_caches()
    gc.collect()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the peaks to the controller, and check that decord is not loaded beside array_record.

    Both in one process crash it: the reference's reader runs in a separate process (reference_clips.py).
    """
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peaks"] = session.config.stash[PEAKS]["this process"]
    assert "decord" not in sys.modules


class TestProcesses:
    """Hooks of the pytest-xdist controller for the end of a test process."""

    def __init__(self, terminal) -> None:
        self.died, self._terminal = "", terminal

    def pytest_testnodedown(self, node, error) -> None:
        """Keep the peaks of a test process that ended, and note one that died."""
        output = getattr(node, "workeroutput", None) or {}
        node.config.stash[PEAKS][node.gateway.id] = output.get("peaks", {})
        if error:
            self.died = f"test process {node.gateway.id} died"

    def pytest_handlecrashitem(self, crashitem) -> None:
        """Name the test that was running."""
        self.died += f" in {crashitem}"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report) -> None:
        """Print a failure when it happens. End the run if a process died: others would first finish their modules."""
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or str(report.longrepr)
            self._terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {message.splitlines()[0][:200]}")
        if self.died:
            pytest.exit(self.died, returncode=1)


def pytest_plugin_registered(plugin, manager) -> None:
    """Register the hooks of pytest-xdist only where it is loaded."""
    if manager.hasplugin("dsession") and not manager.hasplugin("test-processes"):
        manager.register(TestProcesses(manager.getplugin("terminalreporter")), "test-processes")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the peaks of each test process."""
    for name, peaks in config.stash[PEAKS].items():
        if peaks and peaks["maps"]:
            terminalreporter.write_line(
                f"{name}: peak {peaks['maps']} memory maps (limit 65530), peak memory {peaks['GiB']:.1f} GiB, "
                f"{peaks['read']} programs read from the cache ({peaks['saved']:.0f} s of compilation)"
            )
