"""Compiled programs: a persistent cache, and compilation in threads before they are needed.

XLA compiles outside the GIL, so programs are lowered one after the other and compiled in parallel. A later call of the
jitted function with the same shapes and shardings reuses the executable; nothing is traced or compiled twice.
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

THREADS = 16  # programs compiled at a time: one of a 7B model takes up to 4 GiB of the host's memory
REPORT_SECONDS = 10.0
COMPILED = "/jax/core/compile/backend_compile_duration"  # recorded for cache hits too
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
LOGGED_SECONDS = 1.0  # later compilations that take less are not logged: small helper programs
LOGGED_SHAPES = 12


class Program(NamedTuple):
    """A jitted function and the arguments to compile it for.

    Attributes:
        name: for messages.
        run: the jitted function.
        args: ShapeDtypeStructs with shardings, in trees; static arguments as they are.
    """

    name: str
    run: Any
    args: tuple[Any, ...]


class Counts:
    """Programs that this process compiled, and programs that it read from the cache instead."""

    def __init__(self) -> None:
        self.compiled = self.read = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, _: float, **__: Any) -> None:
        with self._lock:
            self.read += event == READ
            self.compiled += (event == COMPILED) - (event == READ)


class CompilationLog(logging.Filter):
    """Logs each program that is compiled, or read from the cache, in LOGGED_SECONDS or more: one line on stderr.

    jax.monitoring reports the name and the seconds of a compilation. Only the debug log of jax has the shapes: this
    filter of that logger reads them, and drops its debug records.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[str, list[Any]] = {}
        logger = logging.getLogger("jax._src.interpreters.pxla")
        logger.addFilter(self)
        logger.setLevel(logging.DEBUG)
        jax.monitoring.register_event_duration_secs_listener(self._log)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the argument shapes of a program that is about to be compiled. True for warnings and errors."""
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
    """Log the compilations of this process from the first call on."""
    return CompilationLog()


@cache
def counts() -> Counts:
    """The counts of this process, from the first call on."""
    return Counts()


def use_cache(folder: str) -> None:
    """Keep compiled programs in `folder`/compiled (local or gs://), so that the next start reads them.

    A no-op where JAX_COMPILATION_CACHE_DIR or the jax config names a directory; jax's own thresholds then apply.
    Process 0 alone writes, all processes read, and an error of the cache is a warning (jax.compiler). Call this before
    anything is compiled.
    """
    counts()
    if jax.config.jax_compilation_cache_dir:
        return
    # jax reads and writes gs:// through gcsfs, which probes the bucket's kind for 12 to 90 s per operation by default.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    jax.config.update("jax_compilation_cache_dir", f"{folder.rstrip('/')}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own caches take local paths only, and their path would be part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def use_user_cache() -> None:
    """`use_cache` in the user's cache folder: $XDG_CACHE_HOME/avocado, or ~/.cache/avocado.

    A no-op where that folder cannot be written.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "avocado")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that is read-only
        return
    if os.access(folder, os.W_OK):
        use_cache(str(folder))


def compile_ahead(programs: Sequence[Program]) -> None:
    """Compile all programs, in their order as far as threads allow. Process 0 reports progress on stderr.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses a program; a note names it.
    """
    if not programs:
        return
    begun, reported, known = time.monotonic(), time.monotonic(), counts().read
    running: list[Future] = []

    def report() -> None:
        nonlocal reported
        reported = time.monotonic()
        if jax.process_index() == 0:
            done, read = sum(one.done() for one in running), counts().read - known
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
                for one in waited.done:
                    one.result()
                report()
            for one in running:
                one.result()
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
