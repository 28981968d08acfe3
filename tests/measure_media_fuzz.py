"""Read 1,000 mutated clips in reader processes: no crash of this process, no hang, bounded memory.

python tests/measure_media_fuzz.py [COUNT]
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import media_kinds
import numpy as np

from avocado_jax.data.media import Reading
from avocado_jax.data.reader import ClipReader
from avocado_jax.errors import InputError


def main(count: int) -> None:
    """Mutate good clips of many kinds and print the verdicts."""
    random, verdicts, slowest = np.random.default_rng(0), Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder, ClipReader(seconds=60.0) as reader:
        sources = []
        for name, kind in (media_kinds.FAST | media_kinds.SLOW).items():
            if not kind.refused:
                kind.write(Path(folder, name))
                sources.append(Path(folder, name))
        for number in range(count):
            source = sources[number % len(sources)]
            data = bytearray(source.read_bytes())
            if number % 4 == 0:
                data = data[: random.integers(1, len(data))]
            span = min(len(data), 4096) if number % 4 == 1 else len(data)
            for position in random.integers(span, size=random.integers(1, 40)):
                data[position] = random.integers(256)
            path = source.with_stem("mutated")
            path.write_bytes(data)
            begun = time.monotonic()
            try:
                media = reader.read(path, Reading(fewest_pixels=28 * 28 * 4))
                verdict = "read with warnings" if media.warnings else "read"
            except InputError as error:
                line = str(error)
                assert line.startswith(f"{path}: "), line
                assert line.isprintable(), line
                verdict = "died" if "died" in line else "hung" if "took longer" in line else "refused"
                if verdict != "refused" or "cannot be read" in line:
                    print(number, line)
            verdicts[verdict] += 1
            slowest = max(slowest, time.monotonic() - begun)
    memory = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(dict(verdicts), f"slowest {slowest:.1f} s, memory {memory[0]} and {memory[1]} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
