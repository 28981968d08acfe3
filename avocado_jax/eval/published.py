"""Published figures for comparison (arXiv 2510.10395, tables 1 to 4, and later work)."""

from collections.abc import Mapping

SYSTEMS = ("Gemini-2.5-Pro", "Qwen2.5-Omni-7B", "video-SALMONN-2 7B", "AVoCaDO")


def _rows(*names: str, values: tuple[tuple[float, ...], ...]) -> dict[str, dict[str, float]]:
    return {system: dict(zip(names, row, strict=True)) for system, row in zip(SYSTEMS, values, strict=True)}


# Published figures of systems for each benchmark, with our metric names, in percent except for VDC's score. The systems
# of the paper come first, then later ones (until August 2026).
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "video-salmonn-2": _rows(
        "miss",
        "hallucination",
        "total",
        values=((18.1, 13.3, 31.3), (41.7, 15.4, 57.1), (21.2, 17.6, 38.8), (21.1, 16.2, 37.3)),
    )
    | {
        "ASID-Captioner 7B": {"miss": 20.5, "hallucination": 15.4, "total": 35.9},
        "AVCap-7B Da-GRPO": {"total": 35.9},
        "AVCap-7B SFT": {"total": 36.8},
        "AVCap-30B": {"total": 32.7},
    },
    "ugc-videocap": _rows(
        "audio",
        "visual",
        "detail",
        "average",
        values=((69.5, 74.7, 73.7, 72.6), (46.9, 66.1, 60.0, 57.7), (61.8, 71.4, 68.5, 67.2), (73.0, 74.6, 71.8, 73.2)),
    )
    | {
        "ASID-Captioner 7B": {"average": 81.2},
        "AVCap-7B Da-GRPO": {"average": 78.0},
        "AVCap-7B SFT": {"average": 75.2},
        "AVCap-30B": {"average": 85.1},
    },
    "daily-omni": _rows("accuracy", values=((60.2,), (13.4,), (29.9,), (50.1,)))
    | {
        "TimeChat-Captioner": {"accuracy": 52.8},
        "ASID-Captioner 7B": {"accuracy": 61.2},
        "AVCap-30B": {"accuracy": 52.1},
    },
    "worldsense": _rows("accuracy", values=((33.8,), (8.6,), (18.2,), (25.7,)))
    | {
        "TimeChat-Captioner": {"accuracy": 22.6},
        "ASID-Captioner 7B": {"accuracy": 34.0},
        "AVCap-7B SFT": {"accuracy": 30.7},
        "AVCap-30B": {"accuracy": 34.3},
    },
    "vdc": {"Qwen2.5-Omni-7B": {"accuracy": 39.7, "score": 2.2}, "AVoCaDO": {"accuracy": 47.4, "score": 2.5}},
    "dream-1k": {"Qwen2.5-Omni-7B": {"f1": 31.6}, "AVoCaDO": {"f1": 35.9}, "Tarsier2-7B": {"f1": 42.0}},
    "probes": {},  # user-defined questions
}

# The paper's ablation (Table 4): for each benchmark the judge's metric, Dlg.F1 and RepCol.
ABLATION_COLUMNS = (("video-salmonn-2", "total", "Total"), ("daily-omni", "accuracy", "Acc."))
ABLATION: Mapping[str, tuple[float, ...]] = {
    "Qwen2.5-Omni": (57.1, 7.1, 7.1, 13.4, 16.9, 8.1),
    "SFT": (41.4, 74.4, 3.5, 48.1, 73.6, 5.1),
    "SFT + SFT on the 2K": (43.0, 74.1, 2.9, 48.5, 74.8, 5.3),
    "GRPO R_D": (41.3, 76.5, 2.4, 49.5, 76.1, 6.0),
    "+ R_C": (37.3, 75.9, 3.9, 49.5, 75.2, 4.9),
    "+ R_L": (37.3, 76.9, 0.4, 50.1, 76.2, 1.0),
}
