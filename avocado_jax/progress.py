"""Progress of long work on stderr: a bar on a terminal, occasional lines otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int | None = None, every: float = 10.0) -> Iterator[T]:
    """Yield `items` and report progress: a bar on a terminal, else a line every `every` seconds."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total)
        return
    reported = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - reported >= every:
            reported = time.monotonic()
            print(f"{label}: {done}" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)
