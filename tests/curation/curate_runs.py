"""Runs of `curate` against a server, and their comparison with the truth."""

import json

from fake_curator import SMALL, unique_keypoints

from avocado_jax.__main__ import main
from avocado_jax.world.check import measure

QUICK = [*SMALL, "--patience", "120", "--timeout", "60", "--json"]


def curate(capsys, curator, out, url, *more):
    """Run `curate`. Returns exit status, counts, manifest, rejects by id, and stderr."""
    videos = [str(truth["path"]) for truth in curator.truths]
    status = main(["curate", *videos, "--out", str(out), "--url", url, "--model", "m", *QUICK, *more])
    captured = capsys.readouterr()
    counts = json.loads(captured.out) if captured.out else None
    manifest, rejects = (
        [json.loads(line) for line in (out / name).read_text().splitlines()] if (out / name).exists() else []
        for name in ("manifest.jsonl", "rejects.jsonl")
    )
    return status, counts, manifest, {reject["id"]: reject for reject in rejects}, captured.err


def check_truth(manifest, truths, out):
    """Assert that the manifest equals the truth of the clips."""
    assert [line["id"] for line in manifest] == [truth["id"] for truth in truths]
    for line, truth in zip(manifest, truths):
        assert (out / line["video"]).samefile(truth["path"])
        scores = measure(line["caption"], truth)
        assert (scores.recall, scores.hallucination, scores.order, scores.dialogue_f1) == (1.0, 0.0, 1.0, 1.0)
        assert line["keypoints"] == unique_keypoints(truth)
        assert line["dialogues"] == [
            {"speaker": dialogue["speaker"], "text": dialogue["text"]} for dialogue in truth["dialogues"]
        ]
