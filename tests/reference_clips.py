"""Read clips with the reference (qwen-omni-utils on decord), in a separate process.

decord brings a C++ library whose symbols take the place of those that array_record needs for buckets: the two in
one process crash.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np


@lru_cache
def _reader() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def fetch(element: dict[str, Any]) -> np.ndarray:
    """`fetch_video` of a chat's element: [N, 3, h, w] float32."""
    return _reader().submit(_fetch, element).result()


def frames(path: str) -> tuple[np.ndarray, float]:
    """All frames of a file read by decord, [N, h, w, 3] uint8, and their mean rate."""
    return _reader().submit(_frames, path).result()


def _fetch(element: dict[str, Any]) -> np.ndarray:
    import torchvision_ops  # noqa: F401  before qwen_omni_utils
    from qwen_omni_utils.v2_5.vision_process import fetch_video

    return fetch_video(element).numpy()


def _frames(path: str) -> tuple[np.ndarray, float]:
    import decord

    reader = decord.VideoReader(path)
    return reader.get_batch(range(len(reader))).asnumpy(), reader.get_avg_fps()
