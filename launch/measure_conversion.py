"""Time and peak memory of converting a random full-size checkpoint, both ways, and whether it comes back bit for bit.

  python launch/measure_conversion.py /big/disk --size 7b --dtype bfloat16

Each step runs in a process of its own; its peak resident memory is the kernel's figure for that process. Needs
three times the checkpoint's size on the disk (54 GB for 7b in bfloat16).
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from avocado_jax.checkpoint.safetensors import Tensor, read_header
from avocado_jax.models.config import SIZES


def measured(name: str, command: list[str]) -> None:
    """Run one command; say how long it took and how much memory it held at most."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{name} failed")
    print(f"{name}: {seconds:.1f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in read_header(path).items()}


def main() -> int:
    """Make, convert, convert back, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; what is made there is deleted")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    made, run, back = (args.folder / name for name in ("random-hf", "random-run", "random-back"))
    try:
        script = str(Path(__file__).with_name("random_checkpoint.py"))
        measured("random checkpoint", [script, str(made), "--size", args.size, "--dtype", args.dtype])
        measured("from-hf", ["-m", "avocado_jax", "convert", "from-hf", str(made), str(run)])
        measured("to-hf", ["-m", "avocado_jax", "convert", "to-hf", str(run), str(back)])
        ours, theirs = all_tensors(back), all_tensors(made)
        same = ours.keys() == theirs.keys() and all(
            ours[name].read().tobytes() == tensor.read().tobytes() for name, tensor in theirs.items()
        )
        print(f"{len(theirs)} tensors, {'all equal to the bit' if same else 'NOT EQUAL'}")
        return 0 if same else 1
    finally:
        for folder in (made, run, back):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
