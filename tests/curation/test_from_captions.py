"""`curate --from-captions` against a real server: it adds the references that GRPO needs to captions."""

import json
import re
import shutil

import pytest
from chat import chat_server
from fake_curator import stage_of

from avocado_jax.__main__ import main
from avocado_jax.data.manifest import parse_manifest
from avocado_jax.remote import chat as module

TEMPLATE = 'A dog number {0} sits on a red chair. A man says "Good day, number {0}." The dog number {0} barks twice.'
CAPTIONS = [TEMPLATE.format(number) for number in range(4)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def keypoints(caption):
    """Keypoints that an honest model returns for a caption."""
    return [{"text": text, "dimension": "dynamic"} for text in re.findall(r"The dog[^.]*\.|A dog[^.]*\.", caption)]


def dialogues(caption):
    return [{"speaker": "a man", "text": text} for text in re.findall('"([^"]*)"', caption)]


def probes(caption):
    number = re.search(r"number (\d)", caption)[1]
    first = {"question": "Who barks?", "category": "auditory", "answer": f"the dog number {number}"}
    second = {"question": "Where does the dog sit?", "category": "static", "answer": "on a red chair"}
    wrong = [f"the dog number {other}" for other in range(5, 8)], ["on a sofa", "in a blue car", "below a table"]
    return [one | {"choices": [one["answer"], *others]} for one, others in zip((first, second), wrong)]


MAKERS = {"keypoints": keypoints, "dialogues": dialogues, "probes": probes}


def honest(number, request):
    stage, caption = stage_of(request), json.loads(request["messages"][1]["content"])["caption"]
    return json.dumps({stage: MAKERS[stage](caption)})


def write_manifest(folder, lines):
    folder.mkdir(exist_ok=True)
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def manifest(tmp_path):
    """Four lines without references: one in the format of the training set, one with extra fields, two plain ones."""
    user = {"role": "user", "content": "<video>What happens?"}
    swift = {"messages": [user, {"role": "assistant", "content": CAPTIONS[0]}], "videos": ["videos/a.mp4"]}
    more = {"prompt": "Tell.", "system": "", "media_first": False, "references": ["A dog."]}
    lines = [swift, {"id": "b", "video": "clips/b.mp4", "caption": CAPTIONS[1]} | more]
    lines += [{"id": name, "video": f"gs://b/{name}.mp4", "caption": CAPTIONS[at]} for at, name in ((2, "c"), (3, "d"))]
    path = write_manifest(tmp_path / "set", lines)
    (tmp_path / "set" / "clips").mkdir()
    (tmp_path / "set" / "clips" / "b.mp4").write_bytes(b"it is named, not read")
    return path


def curate(capsys, manifest, out, url, *more):
    """Run `curate`, by default without probes. Returns status, counts, manifest lines, rejects by id, and stderr."""
    if "--references" not in more:
        more = ("--references", "keypoints,dialogues", *more)
    given = ["--out", str(out), "--url", url, "--model", "m", "--patience", "60", "--json", *more]
    status = main(["curate", "--from-captions", str(manifest), *given])
    printed = capsys.readouterr()
    written = [
        {line["id"]: line for line in map(json.loads, (out / name).read_text().splitlines())}
        if (out / name).exists()
        else {}
        for name in ("manifest.jsonl", "rejects.jsonl")
    ]
    return status, json.loads(printed.out) if printed.out else None, *written, printed.err


def check_rows(lines, names):
    """Assert that the manifest has these lines, each with the references of its caption."""
    assert list(lines) == names
    entries, bad = parse_manifest("".join(json.dumps(line) + "\n" for line in lines.values()).encode())
    assert (len(entries), bad) == (len(names), [])
    for entry in entries:
        assert entry.fields["keypoints"] == keypoints(entry.fields["caption"])
        assert entry.fields["dialogues"] == dialogues(entry.fields["caption"])


NAMES = ["videos/a.mp4#1", "b", "c", "d"]


def test_captions_become_rows_for_grpo(manifest, tmp_path, capsys):
    """Every field is kept. Relative paths are rewritten for the new manifest; other names stay."""
    out = tmp_path / "other" / "out"
    with chat_server(honest) as server:
        status, counts, lines, rejects, _ = curate(capsys, manifest, out, server.url)
        assert (status, rejects, counts["kept"], counts["calls"], len(server.requests)) == (0, {}, 4, 8, 8)
        assert curate(capsys, manifest, out, server.url)[:3] == (0, counts, lines)
        assert len(server.requests) == 8
    check_rows(lines, NAMES)
    assert [line["video"] for line in lines.values()] == [
        "videos/a.mp4",
        "../../set/clips/b.mp4",
        "gs://b/c.mp4",
        "gs://b/d.mp4",
    ]
    assert lines["videos/a.mp4#1"]["prompt"] == "What happens?"
    more = {name: lines["b"][name] for name in ("prompt", "system", "media_first", "references")}
    assert more == {"prompt": "Tell.", "system": "", "media_first": False, "references": ["A dog."]}


def test_all_references_are_made_by_default(manifest, tmp_path, capsys):
    """The order of choices does not depend on the model; the right choice is identified by its text."""
    with chat_server(honest) as server:
        given = ["--out", str(tmp_path / "out"), "--url", server.url, "--model", "m", "--json"]
        assert main(["curate", "--from-captions", str(manifest), *given]) == 0
        counts = json.loads(capsys.readouterr().out)
    assert (counts["kept"], counts["calls"], len(server.requests)) == (4, 12, 12)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    check_rows({line["id"]: line for line in lines}, NAMES)
    places = set()
    for line in lines:
        for made, expected in zip(line["probes"], probes(line["caption"]), strict=True):
            assert {name: made[name] for name in ("question", "answer", "category")} == {
                name: expected[name] for name in ("question", "answer", "category")
            }
            assert sorted(made["choices"]) == sorted(expected["choices"])
            places.add(made["choices"].index(made["answer"]))
    assert len(places) > 2


def test_invalid_probes_are_requested_again(manifest, tmp_path, capsys):
    """Invalid: answers that the caption does not state, choices that refer to others, answers that are not a choice."""
    wrong = [{"answer": "a purple elephant", "choices": ["a purple elephant", "a cat", "a dog", "a cow"]}]
    wrong += [{"choices": ["on a red chair", "all of the above", "on a sofa", "in a car"]}, {"answer": "nowhere"}]

    def liar(number, request):
        caption, stage, turns = (
            json.loads(request["messages"][1]["content"])["caption"],
            stage_of(request),
            len(request["messages"]),
        )
        if stage != "probes" or caption == CAPTIONS[0]:
            return honest(number, request)
        attempt = turns // 2 - 1
        if caption == CAPTIONS[1] and attempt == 2:
            return honest(number, request)
        right = probes(caption)
        return json.dumps({"probes": [right[0], right[1] | wrong[attempt]]})

    with chat_server(liar) as server:
        wanted = ["--references", "probes"]
        status, counts, lines, rejects, _ = curate(capsys, manifest, tmp_path / "out", server.url, *wanted)
    assert (status, counts["calls"], counts["rejected"]) == (0, 1 + 3 * 3, {"probes": 2})
    assert [*lines] == NAMES[:2]
    assert all("keypoints" not in line and len(line["probes"]) == 2 for line in lines.values())
    assert "neither one of the choices" in rejects["c"]["reason"]
    messages = [message["content"] for request in server.requests for message in request["messages"][3::2]]
    assert any("an answer that the caption does not state, «a purple elephant»" in words for words in messages)
    assert any("a choice that refers to others, «all of the above»" in words for words in messages)


def test_maximum_of_calls_is_a_bound(manifest, tmp_path, capsys):
    """Every answer is reported as truncated: three attempts per question at most."""
    truncated = json.dumps(
        {"choices": [{"message": {"content": '{"keypoints": ['}, "finish_reason": "length"}]}
    ).encode()
    with chat_server(lambda *_: truncated) as server:
        _, estimate, *_ = curate(capsys, manifest, tmp_path / "out", server.url, "--dry-run")
        status, counts, _, rejects, _ = curate(capsys, manifest, tmp_path / "out", server.url)
    assert (status, len(rejects), estimate["calls_at_most"]) == (0, 4, 24)
    assert counts["calls"] == len(server.requests) == 12  # a line is rejected at its first stage


def test_lines_with_references_make_no_calls(tmp_path, capsys):
    point = {"text": "A dog sits.", "dimension": "static"}
    lines = [
        {"id": "both", "video": "v", "caption": "Short.", "keypoints": [point], "dialogues": []},
        {"id": "points", "video": "v", "caption": CAPTIONS[0], "keypoints": [point]},
        {"id": "lines", "video": "v", "caption": CAPTIONS[1], "keypoints": [], "dialogues": []},
    ]
    manifest = write_manifest(tmp_path, lines)
    with chat_server(honest) as server:
        status, counts, written, rejects, _ = curate(capsys, manifest, tmp_path / "out", server.url)
    assert (status, counts["calls"], rejects) == (0, 2, {})
    assert written["both"] == lines[0]
    assert written["points"] == lines[1] | {"dialogues": dialogues(CAPTIONS[0])}
    assert written["lines"] == lines[2] | {"keypoints": keypoints(CAPTIONS[1])}


def test_killed_run_resumes_without_repeated_calls(manifest, tmp_path, capsys):
    """The journal after kill -9 at the sixth question: five answers and a partial line."""
    killed = tmp_path / "killed"

    def spy(number, request):
        if number == 5:
            killed.mkdir()
            shutil.copy(tmp_path / "out" / "answers.jsonl", killed)
            with (killed / "answers.jsonl").open("ab") as file:
                file.write(b'{"key": "half a li')
        return honest(number, request)

    with chat_server(spy) as server:
        curate(capsys, manifest, tmp_path / "out", server.url, "--concurrency", "1")
    with chat_server(honest) as server:
        status, counts, lines, _, _ = curate(capsys, manifest, killed, server.url)
        assert (status, counts["calls"], len(server.requests)) == (0, 8, 3)
    check_rows(lines, NAMES)


def test_wrong_answers_are_retried_and_then_listed(manifest, tmp_path, capsys):
    """The first answer for one caption invents a fact; all answers for another invent a line."""

    def liar(number, request):
        caption, stage = json.loads(request["messages"][1]["content"])["caption"], stage_of(request)
        if (caption, stage, len(request["messages"])) == (CAPTIONS[1], "keypoints", 2):
            return json.dumps({"keypoints": [{"text": "Two cats sleep below an umbrella.", "dimension": "static"}]})
        if (caption, stage) == (CAPTIONS[2], "dialogues"):
            return json.dumps({"dialogues": [{"speaker": "the dog", "text": "Who are you?"}]})
        return honest(number, request)

    with chat_server(liar) as server:
        status, counts, lines, rejects, _ = curate(capsys, manifest, tmp_path / "out", server.url)
    assert (status, counts["calls"], counts["rejected"]) == (0, 8 + 1 + 2, {"dialogues": 1})
    check_rows(lines, ["videos/a.mp4#1", "b", "d"])
    assert rejects["c"]["video"] == "gs://b/c.mp4"
    assert "does not hold" in rejects["c"]["reason"]
    again = [request["messages"][3]["content"] for request in server.requests if len(request["messages"]) == 4]
    assert any("the caption does not state: «Two cats" in words for words in again)


def test_budget_covers_all_runs(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(honest) as server:
        for _ in range(2):
            budget = ["--budget-calls", "5", "--concurrency", "1"]
            status, counts, lines, _, stderr = curate(capsys, manifest, out, server.url, *budget)
            assert (status, len(server.requests), counts["calls"], counts["left"]) == (3, 5, 5, 2)
            assert "the budget would be exceeded" in stderr
            check_rows(lines, NAMES[:2])
        status, counts, lines, _, _ = curate(capsys, manifest, out, server.url, "--budget-calls", "8")
        assert (status, len(server.requests)) == (0, 8)
    check_rows(lines, NAMES)


def test_bad_lines_and_bad_captions_are_listed_without_a_call(tmp_path, capsys):
    lines = [
        {"id": "short", "video": "v", "caption": "A dog."},
        {"id": "again", "video": "v", "caption": "A red circle spins slowly. " * 30},
        {"id": "none", "video": "v"},
        {"id": "good", "video": "v", "caption": CAPTIONS[0]},
        {"id": "good", "video": "v", "caption": CAPTIONS[1]},
    ]
    manifest = write_manifest(tmp_path, lines)
    with chat_server(honest) as server:
        status, counts, written, rejects, _ = curate(capsys, manifest, tmp_path / "out", server.url)
    assert (status, counts["calls"], counts["bad_lines"], list(written)) == (0, 2, 2, ["good"])
    assert counts["rejected"] == {"length": 1, "repetition": 1}
    stages = {name: one["stage"] for name, one in rejects.items()}
    assert stages == {"none": "line", "good": "line", "short": "length", "again": "repetition"}
    assert rejects["none"]["reason"] == "line 3: has no 'caption'"


def test_dry_run_bounds_the_tokens(manifest, tmp_path, capsys):
    spent = []

    def counting(number, request):
        spent.append(module.estimate(request) - 100)
        answer = {"choices": [{"message": {"content": honest(number, request)}}], "usage": {"total_tokens": spent[-1]}}
        return json.dumps(answer).encode()

    with chat_server(counting) as server:
        least = ["--answer-tokens", "300"]
        _, estimate, *_ = curate(capsys, manifest, tmp_path / "out", server.url, "--dry-run", *least)
        assert (estimate["captions"], estimate["complete"], estimate["calls"], estimate["calls_at_most"]) == (
            4,
            0,
            8,
            24,
        )
        assert not server.requests
        assert not (tmp_path / "out").exists()
        budget = ["--budget-tokens", str(estimate["tokens_at_most"]), *least]
        status, counts, *_ = curate(capsys, manifest, tmp_path / "out", server.url, *budget)
    assert (status, counts["tokens"]) == (0, sum(spent))
    assert 0 < counts["tokens"] <= estimate["tokens_at_most"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either videos or --from-captions"),
        (["MANIFEST", "--from-captions", "MANIFEST"], "either videos or --from-captions"),
        (["--from-captions", "MANIFEST", "--checkpoint", "REF"], "excludes --from-captions"),
        (["--from-captions", "MANIFEST", "--references", "probes,quizzes"], "'quizzes' is not one of keypoints"),
        (["--from-captions", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--from-captions", "EMPTY"], "has no lines"),
        (["--from-captions", "OUT"], "would be overwritten"),
    ],
)
def test_invalid_input_is_a_one_line_error(arguments, message, manifest, tmp_path, capsys):
    named = {"MANIFEST": manifest, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "out" / "manifest.jsonl"}
    named["EMPTY"].write_text("\n")
    named["OUT"].parent.mkdir()
    shutil.copy(manifest, named["OUT"])
    given = ["--out", str(tmp_path / "out"), "--url", "http://127.0.0.1:9/v1", "--model", "m", "--patience", "0.5"]
    assert main(["curate", *given, *[str(named.get(argument, argument)) for argument in arguments]]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
