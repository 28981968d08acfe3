"""The `score` command with a remote judge: its answers, and missing ones."""

import json

import pytest
from chat import chat_server

from avocado_jax.__main__ import main

LINES = [
    {"id": "a", "caption": "a dog barks at the red door", "reference": {"keypoints": ["a dog", "a cat", "red door"]}},
    {"id": "b", "caption": "a cat sleeps", "reference": {"keypoints": [{"text": "a cat", "dimension": "static"}]}},
    {"id": "c", "caption": "nothing to compare with"},
]


@pytest.fixture
def captions(tmp_path):
    """Captions with keypoints, and one without."""
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(file)


def score(capsys, *arguments):
    """Run the command. Returns the exit status, rows and stderr."""
    status = main(["score", *arguments, "--terms", "checklist", "--json"])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


@pytest.mark.slow
def test_endpoint_as_judge(captions, tmp_path, capsys):
    """Answers become scores and are cached. Missing answers are null and reported with their cause."""

    def refuse(number, request):
        return (400, {}, b"too long") if "cat sleeps" in request["messages"][1]["content"] else None

    with chat_server(refuse) as server:
        arguments = [captions, "--judge", "remote", "--judge-model", "judge-1", "--judge-url", server.url]
        status, rows, errors = score(capsys, *arguments, "--judge-cache", str(tmp_path / "cache"), "--explain")
    assert status == 0
    assert [row["keypoints"] for row in rows] == [[1, 0, 1], [None], None]
    assert [row["R_C"] for row in rows] == [pytest.approx(2 / 3), None, None]
    assert "1 of 4 keypoints have no answer" in errors
    assert "too long" in errors
    assert len(server.requests) == 2
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "remote"], "needs --judge-model"),
        (["--judge", "remote", "--judge-model", "judge-1"], "judge's URL is ''"),
        (["--judge", "lm", "--judge-model", "nowhere"], "no such folder"),
        (["--judge", "embedding", "--judge-model", "nowhere"], "no such file"),
    ],
)
def test_missing_judge_is_bad_input(captions, capsys, arguments, message):
    status, rows, errors = score(capsys, captions, *arguments)
    assert (status, rows) == (2, [])
    assert message in errors.splitlines()[-1]
