"""Limit the memory maps of compiled programs.

XLA's CPU backend maps each object file of a program separately: a training step takes about 1,200 maps. Linux allows
65,530 maps per process (vm.max_map_count); above this limit the compiler crashes with a segmentation fault. A run with
many shapes reaches it after about fifty programs (`python tests/measure_maps.py --kind step`).
"""

import gc
import logging
from functools import cache
from pathlib import Path
from typing import Any

import jax

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
COMPILED = "/jax/core/compile/backend_compile_duration"


def memory_maps() -> int:
    """The number of memory maps of this process; 0 if the system does not report it."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


@cache
def bound_compiled_programs() -> None:
    """Drop all compiled programs when more than half of the allowed memory maps are in use after a compilation.

    Dropped programs are recompiled, or read from the persistent cache, on their next use. A no-op if the system does
    not report memory maps, and effectively on TPU and GPU, whose programs need no maps.
    """
    if LIMIT.exists():
        jax.monitoring.register_event_duration_secs_listener(_drop_past(int(LIMIT.read_text()) // 2))


def _drop_past(limit: int) -> Any:
    def listen(event: str, _: float, **__: Any) -> None:
        if event == COMPILED and (maps := memory_maps()) > limit:
            logging.getLogger(__name__).warning("dropping compiled programs: %d memory maps in use", maps)
            jax.clear_caches()
            gc.collect()

    return listen
