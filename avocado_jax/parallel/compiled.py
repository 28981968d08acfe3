"""Compiled programs: a persistent cache, and ahead-of-time compilation in threads.

XLA compiles outside the GIL, so programs are lowered sequentially and compiled in parallel. A later call of the jitted
function with the same shapes and shardings reuses the executable, without another trace or compilation.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

THREADS = 16  # programs compiled concurrently; a program of a 7B model takes up to 4 GiB of host memory
REPORT_SECONDS = 10.0
COMPILED = "/jax/core/compile/backend_compile_duration"  # also recorded for cache hits
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
LOGGED_SECONDS = 1.0  # shorter compilations during the run (small helper programs) are not logged
LOGGED_SHAPES = 12


class Program(NamedTuple):
    """A jitted function and the arguments to compile it for.

    Attributes:
        name: name in messages.
        run: the jitted function.
        args: trees of ShapeDtypeStructs with shardings; static arguments unchanged.
    """

    name: str
    run: Any
    args: tuple[Any, ...]


class Counts:
    """Counts the programs that this process compiled, and those that it read from the cache."""

    def __init__(self) -> None:
        self.compiled = self.read = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, _: float, **__: Any) -> None:
        with self._lock:
            self.read += event == READ
            self.compiled += (event == COMPILED) - (event == READ)


class CompilationLog(logging.Filter):
    """Logs compilations and cache reads of at least LOGGED_SECONDS to stderr, one line each.

    jax.monitoring reports the name and the seconds of a compilation. Only jax's debug log has the shapes: this filter
    of that logger reads them, and drops the debug records.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[str, list[Any]] = {}
        logger = logging.getLogger("jax._src.interpreters.pxla")
        logger.addFilter(self)
        logger.setLevel(logging.DEBUG)
        jax.monitoring.register_event_duration_secs_listener(self._log)

    def filter(self, record: logging.LogRecord) -> bool:
        """Store the argument shapes of the next compilation. Returns True for warnings and errors."""
        if record.msg.startswith("Compiling ") and record.args:
            self._shapes[record.args[0]] = record.args[1]
        return record.levelno > logging.DEBUG

    def _log(self, event: str, seconds: float, **details: Any) -> None:
        if event != COMPILED or (name := details.get("fun_name")) is None:
            return
        shapes = [shape.str_short(short_dtypes=True) for shape in self._shapes.pop(name, ())]
        if seconds >= LOGGED_SECONDS and jax.process_index() == 0:
            before = f"{len(shapes) - LOGGED_SHAPES} arrays, " if len(shapes) > LOGGED_SHAPES else ""
            text = f"{name}({before}{', '.join(shapes[-LOGGED_SHAPES:])})"
            print(f"compiled during the run, in {seconds:.1f} s: {text}", file=sys.stderr, flush=True)


@cache
def log_compilations() -> CompilationLog:
    """Log the compilations of this process after the first call."""
    return CompilationLog()


@cache
def counts() -> Counts:
    """The counts of this process since the first call."""
    return Counts()


def use_cache(folder: str) -> None:
    """Use `folder`/compiled (local or gs://) as persistent cache of compiled programs.

    A no-op if JAX_COMPILATION_CACHE_DIR or the jax config sets a directory; jax's thresholds then apply. Only process 0
    writes, all processes read, and errors of the cache are warnings (jax.compiler). Call this before the first
    compilation.
    """
    counts()
    if jax.config.jax_compilation_cache_dir:
        return
    # jax accesses gs:// through gcsfs, which by default probes the bucket type for 12 to 90 s per operation.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    jax.config.update("jax_compilation_cache_dir", f"{folder.rstrip('/')}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's caches support only local paths, and their path would be part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def use_user_cache() -> None:
    """Call `use_cache` with the user's cache folder: $XDG_CACHE_HOME/avocado, or ~/.cache/avocado.

    A no-op if that folder is not writable.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "avocado")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        return
    if os.access(folder, os.W_OK):
        use_cache(str(folder))


def compile_ahead(programs: Sequence[Program]) -> None:
    """Compile all programs in threads. Process 0 reports progress on stderr.

    Raises:
        jax.errors.JaxRuntimeError: a compilation failed; a note names the program.
    """
    if not programs:
        return
    begun, reported, known = time.monotonic(), time.monotonic(), counts().read
    running: list[Future] = []

    def report() -> None:
        nonlocal reported
        reported = time.monotonic()
        if jax.process_index() == 0:
            done, read = sum(future.done() for future in running), counts().read - known
            cached = f" ({read} from the cache)" if read else ""
            line = f"compiled {done} of {len(programs)} programs{cached}, {reported - begun:.0f} s"
            print(line, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1, THREADS), "compile") as pool:
        try:
            for program in programs:  # in this thread: tracing needs the GIL and the mesh in use
                running.append(pool.submit(_compile, program.name, program.run.lower(*program.args)))
                if time.monotonic() - reported > REPORT_SECONDS:
                    report()
            while (waited := wait(running, REPORT_SECONDS, FIRST_EXCEPTION)).not_done:
                for future in waited.done:
                    future.result()
                report()
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report()


def _compile(name: str, lowered: Any) -> None:
    try:
        lowered.compile()
    except Exception as error:
        error.add_note(f"in the compilation of {name}")
        raise
