"""The padded share of FLOPs against the number of compiled shapes, for clips of 4 to 100 s in eight sizes.

PYTHONPATH=tests/data python tests/measure_padding.py
"""

import sys

import numpy as np
from test_plan import realistic_sizes

from avocado_jax.data.index import sizes
from avocado_jax.data.plan import choose_buckets, make_plan
from avocado_jax.models.config import SEVEN_B

SHAPES = (1, 2, 4, 8, 12, 16, 24, 32, 45)


def main() -> int:
    """Print a table."""
    index = realistic_sizes(2000)
    needed = sizes(index, 150, 1024, SEVEN_B)
    print("shapes", *SHAPES, sep="\t")
    for group in (1, 8):
        shares = []
        for count in SHAPES:
            plan = make_plan(needed, choose_buckets(needed, count, group, SEVEN_B), 8, 0, group, SEVEN_B)
            shares.append(f"{100 * plan.padded_share():.1f}%")
        print(f"G = {group}", *shares, sep="\t", flush=True)
    cells = np.asarray(index.height) // 28 * (np.asarray(index.width) // 28)
    windows, patches = np.asarray(needed.shape.windows), np.asarray(needed.shape.patches)
    print(f"empty slots of edge windows: {100 * (1 - (patches * cells / 16).sum() / (patches * windows).sum()):.1f}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
