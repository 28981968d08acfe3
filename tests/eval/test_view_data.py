"""`avocado view`: the data that it reads from a run, without a browser."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import gcs
from fake_run import write_run

from avocado_jax.__main__ import main
from avocado_jax.config import RewardConfig
from avocado_jax.data import storage
from avocado_jax.eval.report import curves, page, weights


def view(run, *more, status=0):
    assert main(["view", str(run), *map(str, more)]) == status


def test_weights_equal_the_config():
    rewards = asdict(RewardConfig(checklist=0.5, timing=2.0, extra=("host:my.module:brevity=0.25", "jax:m:f=-1")))
    expected = {"checklist": 0.5, "dialogue": 1.0, "length": 1.0, "repetition": 0.0, "timing": 2.0, "probes": 0.0}
    assert weights({"rewards": rewards}) == expected | {"brevity": 0.25, "f": -1.0}
    assert weights({}) == {}


def test_curves_are_averaged_and_keep_gaps():
    lines = [{"step": k + 1, "loss": float(k), "bad": None, "text": "no", "perf": {"mfu": None}} for k in range(2500)]
    lines[0]["loss"], lines[7]["rare"] = float("nan"), 3
    made = {curve["name"]: curve for curve in curves(lines)}
    assert set(made) == {"loss", "rare"}
    assert made["loss"]["mean"] == 3
    assert made["loss"]["steps"][:2] == [3, 6]
    assert made["loss"]["values"][:2] == [1.5, 4.0]
    assert (made["rare"]["steps"], made["rare"]["values"], made["rare"]["mean"]) == ([8], [3.0], 1)
    assert "NaN" not in page({"curves": curves(lines)}).split('id="data"')[1].split("</script>")[0]


def test_invalid_input_is_a_one_line_error(tmp_path, capsys):
    def error_line(*arguments):
        capsys.readouterr()
        view(*arguments, status=2)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "metrics.jsonl: No such file" in error_line(tmp_path / "nothing")
    write_run(tmp_path / "run", 3, 1, clips=1)
    assert "--last is 0" in error_line(tmp_path / "run", "--last", "0")
    assert "none.jsonl: No such file" in error_line(tmp_path / "run", "--data", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    assert "line 1: has no 'video'" in error_line(tmp_path / "run", "--data", tmp_path / "bad.jsonl")
    file = tmp_path / "run" / "rollouts" / "3.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    for changed, message in (
        ({"caption": None}, '3.jsonl:1: "caption" must be a string'),
        ({"rewards": {"a": "b"}}, "3.jsonl:1: rewards and advantage must be numbers or null"),
        ({"rewards": []}, '3.jsonl:1: "rewards" must be an object'),
    ):
        file.write_text(json.dumps(line | changed) + "\n")
        assert message in error_line(tmp_path / "run")


def test_partially_written_line_is_ignored(tmp_path):
    write_run(tmp_path, 4, 0)
    shutil.rmtree(tmp_path / "rollouts")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss"')
    view(tmp_path, "--out", tmp_path / "page.html")
    page_data = json.loads(Path(tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert page_data["steps"] == 4


def test_view_of_a_run_in_a_bucket(tmp_path, monkeypatch, capsys):
    cached = []
    monkeypatch.setattr("avocado_jax.cli.view.use_user_cache", lambda: cached.append(True))
    write_run(tmp_path / "run", 4, 3, clips=1, world="")
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    with gcs.storage_server(tmp_path / "root") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        storage._client.cache_clear()
        for path in filter(Path.is_file, (tmp_path / "run").rglob("*")):
            storage.write(f"gs://bucket/{path.relative_to(tmp_path)}", path.read_bytes())
        view("gs://bucket/run", "--last", 2)
        assert capsys.readouterr().out == "gs://bucket/run/report.html\n"
        text = storage.read("gs://bucket/run/report.html").decode()
    storage._client.cache_clear()
    page_data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [group["step"] for group in page_data["groups"]] == [3, 4]
    assert cached == [True]


def test_curves_of_logged_terms_are_shown_initially():
    lines = [
        {"step": step, "loss": 0.1, "reward": 1.0, "reward_timing": 0.3, "reward_timing_std": 0.1, "reward_probes": 0.5}
        for step in (1, 2)
    ]
    shown = [curve["name"] for curve in curves(lines) if curve["shown"]]
    assert shown == ["loss", "reward", "reward_timing", "reward_probes"]
