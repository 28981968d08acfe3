"""A bound on the memory maps that compiled programs take.

XLA's CPU backend maps each object file of a program by itself: a training step takes about 1,200 maps. Linux allows a
process 65,530 (vm.max_map_count); past that the compiler dies of a segmentation fault. A run with many shapes gets
there after some fifty programs (`python tests/measure_maps.py --kind step`).
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
    """Number of memory maps of this process; 0 where the system does not report them."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


@cache
def bound_compiled_programs() -> None:
    """Drop all compiled programs whenever a compilation leaves half of the allowed memory maps in use.

    Programs that are used again are compiled again, or read from the persistent cache. A no-op where the system does
    not report memory maps, and in effect on TPU and GPU, whose programs take none.
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
