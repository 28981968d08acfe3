"""The memory maps of this process."""

from pathlib import Path


def memory_maps() -> int:
    """Number of memory maps of this process; Linux allows vm.max_map_count of them."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")
