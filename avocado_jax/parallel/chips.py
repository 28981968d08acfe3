"""Peak figures of one device from the vendors, by jax's device kind.

TPU: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /v4 (dense bf16 FLOP/s, HBM size and bandwidth) and "How to Scale Your
Model" (jax-ml.github.io/scaling-book/tpus: one-way bandwidth of a link, of which v5e and v6e have four and v4 and v5p
six). NVIDIA: data sheets of A100, H100 and H200 SXM; NVLink one way.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peak figures of one device."""

    flops: float  # dense bf16 FLOPs per second
    memory: float  # bytes
    bandwidth: float  # memory bandwidth in bytes per second
    links: float  # one-way bandwidth to other devices of the slice over all links, in bytes per second


GIB = 2**30
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.23e12, 6 * 45e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.82e12, 4 * 45e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.77e12, 6 * 90e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12, 4 * 90e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2.04e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9),
}
