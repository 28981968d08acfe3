"""`avocado view`: the page of a run, in a real browser."""

import json
import shutil
import unicodedata

import pytest
from chromium import browser
from fake_run import TERMS, references, write_run

from avocado_jax.__main__ import main
from avocado_jax.world.check import measure
from avocado_jax.world.clip import write_clip
from avocado_jax.world.director import make_script

STEPS, ROLLOUTS, CLIPS, GROUP = 30, 3, 4, 4
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=2"><svg onload=window.hacked=3>',
    "<!--<script>\"quoted\" 'single' &lt;amp; {{script}} {{data}} \\u003cb",
    "nul\0here \u202eright to left\u2066 \ud83d half \u2028 line\r\nnext\tend",
    "😀 A 👩‍👩‍👧 e\u0301 \U00020000 says, ",
)


def view(run, *more, status=0):
    assert main(["view", str(run), *map(str, more)]) == status


def lines_of(run, step):
    return [json.loads(line) for line in (run / "rollouts" / f"{step}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chromium():
    with browser() as page:
        yield page


@pytest.fixture
def opened(chromium):
    """Open a page, and assert at the end that it has no errors, dialogs or external requests."""

    def open_(path, **how):
        chromium.errors.clear(), chromium.requests.clear(), chromium.dialogs.clear()
        chromium.open(path.as_uri(), **how)
        return chromium

    yield open_
    assert not chromium.errors
    assert not chromium.dialogs
    assert all(url.startswith(("file:///", "data:")) for url in chromium.requests)


def altered(text, draw, step):
    """The reference in the newest step; in earlier steps without its lines or with other lines."""
    if step == STEPS:
        return text
    kind = draw.randrange(3)
    return [text.split(" says in a")[0] + ".", f'😀👩‍👩‍👧 {text} A voice says, "Not in there."', "Nothing."][kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "grpo <b>&run"
    write_run(folder, STEPS, ROLLOUTS, CLIPS, GROUP, caption=altered)
    view(folder, "--last", 2)
    return folder


def test_curves_are_selected_and_show_values(run, opened):
    page = opened(run / "report.html")
    assert page.texts("h1") == ["grpo <b>&run"]
    first = page.texts(".chart b")
    assert {"reward", "kl", "loss", "heldout_reward"} <= set(first)
    assert "lr" not in first
    page.click("#names button:nth-child(9)")
    assert page.texts("#names button:nth-child(9)") == ["lr"]
    assert set(page.texts(".chart b")) == {*first, "lr"}
    page.click("#names button:nth-child(9)")
    assert page.texts(".chart b") == first
    # A value that is not finite is a gap: the line is drawn in two pieces.
    assert (
        page.evaluate("document.querySelector('[data-curve=loss] .raw').getAttribute('d').split('M').length - 1") == 2
    )
    assert page.evaluate("document.querySelectorAll('[data-curve=heldout_reward] circle').length") == STEPS // 5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    page.point("[data-curve=kl] svg")
    at = int(page.texts("[data-curve=kl] span")[0].rsplit(" ")[-1])
    assert 10 < at < 20
    assert page.texts("[data-curve=reward] span") == [f"{lines[at - 1]['reward']:.3f} at {at}"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_rollouts_are_sorted_and_filtered_by_any_term(run, opened):
    page = opened(run / "report.html")
    lines = [line for step in (30, 29) for line in lines_of(run, step)]
    groups = [lines[k : k + GROUP] for k in range(0, len(lines), GROUP)]
    assert page.texts("#count") == [f"{len(groups)} clips, {len(lines)} captions"]
    assert "Rollouts of 2 steps from 29 to 30" in page.texts("#notes li")[0]
    assert page.texts("th button") == ["reward", *TERMS, "advantage", "tokens"]
    values = page.texts("tr.numbers td.num")
    wanted = [[line["reward"], *line["rewards"].values(), line["advantage"], line["length"]] for line in groups[0]]
    columns = 2 + len(TERMS) + 2
    shown = [
        [float(text.replace("−", "-")) for text in values[k : k + columns]] for k in range(0, len(values), columns)
    ]
    assert [one[0] for one in shown] == [1, 2, 3, 4]
    assert [one[1:] for one in shown] == [pytest.approx(one, abs=6e-4) for one in wanted]

    def listed(value):
        return sorted((sum(map(value, group)) / GROUP for group in groups), reverse=True)

    first = page.texts(".row[aria-current=true] .clip")
    page.click("th:nth-child(4) button")  # dialogue: high first, then low first
    assert page.texts(".row[aria-current=true] .clip") == first  # the group stays open
    assert page.texts("th[aria-sort=descending] button") == ["dialogue ↓"]
    column = [float(text) for text in page.texts("td[data-term=dialogue]")]
    assert column == sorted(column, reverse=True)
    means = listed(lambda line: line["rewards"]["dialogue"])
    assert [float(text) for text in page.texts(".row .num:last-child")] == pytest.approx(means, abs=6e-4)
    page.click("#order")
    assert [float(text) for text in page.texts(".row .num:last-child")] == pytest.approx(means[::-1], abs=6e-4)
    page.choose("#sort", "advantage")
    page.choose("#how", "worst")
    worst = sorted(min(line["advantage"] for line in group) for group in groups)
    found = [float(text.replace("−", "-")) for text in page.texts(".row .num:last-child")]
    assert found == pytest.approx(worst, abs=6e-4)

    page.choose("#term", "checklist")
    page.write("#least", "0.9")
    assert page.texts(".row[aria-current=true]") == page.texts(".row:first-child")
    few = [[line for line in group if line["rewards"]["checklist"] >= 0.9] for group in groups]
    count = sum(map(len, few)), sum(map(bool, few))
    assert 0 < count[0] < len(lines)
    assert page.texts("#count") == [f"{count[1]} clips, {count[0]} captions"]
    open_now = page.evaluate("document.querySelectorAll('tr.numbers:not(.out)').length")
    assert 0 < open_now < GROUP
    page.write("#most", "-1")
    assert page.texts("#group") == ["No caption matches."]
    page.choose("#term", "")
    page.write("#find", "NOT IN THERE")
    count = sum("Not in there" in line["caption"] for line in lines)
    assert page.texts("#count")[0].endswith(f" {count} captions")


def test_columns_show_the_weights_of_the_reward(run, opened):
    """Terms of weight 0 are marked in the head and in the column; other values have no weight."""
    page = opened(run / "report.html")
    weighted = (
        "[...document.querySelectorAll('th')].filter((one) => one.querySelector('.weight')).map((one) => one.innerText)"
    )
    assert page.evaluate(weighted) == ["checklist × 1", "dialogue × 1", "length × 1", "repetition × 0"]
    assert page.texts("th:has(.unweighted) button") == ["repetition"]
    terms = "[...new Set([...document.querySelectorAll('td.unweighted')].map((one) => one.dataset.term))]"
    assert page.evaluate(terms) == ["repetition"]


def test_matches_are_highlighted(run, opened):
    page = opened(run / "report.html")
    known = {reference["id"]: reference for reference in references(CLIPS)}
    spoken = next(name for name, one in known.items() if one["dialogues"])
    page.write("#find", spoken)
    page.choose("#step", "30")
    lines = [line["text"] for line in known[spoken]["dialogues"]]
    assert page.texts("tr.said:nth-child(2) .quote") == lines  # the reference itself
    assert page.evaluate("document.querySelectorAll('td .quote:not(.same)').length") == 0
    points = len(known[spoken]["keypoints"])
    assert len(page.texts("tr.said:nth-child(2) .pill.stated")) == points
    page.point("tr.said:nth-child(2) .pill:nth-of-type(3)")
    lit = page.texts("tr.said:nth-child(2) .caption .lit")
    text = known[spoken]["keypoints"][1]["text"]
    assert lit
    assert all(word in text for word in lit)
    assert page.texts("li.lit bdi") == [text]

    page.choose("#step", "29")
    page.write("#find", "not in there")
    captions = [line["caption"] for line in lines_of(run, 29) if "Not in there" in line["caption"]]
    assert captions
    for row in page.evaluate(
        "[...document.querySelectorAll('tr.said:not(.out) .caption')].map(node => [node.textContent, "
        "[...node.querySelectorAll('.quote.none')].map(one => one.textContent), "
        "[...node.querySelectorAll('.point')].map(one => one.textContent)])"
    ):
        assert row[0] in captions  # complete, with emoji before the highlights
        assert row[1] == ["Not in there."]
        assert all(word.replace("-", "").isalnum() for word in row[2])


def test_highlights_equal_the_matches_of_the_rewards(run):
    """R_D computed from the highlights equals that of the AVWorld checker."""
    page_data = json.loads((run / "report.html").read_text().split('id="data">')[1].split("</script>")[0])
    known, kinds = {reference["id"]: reference for reference in references(CLIPS)}, set()
    for group in page_data["groups"]:
        clip = page_data["clips"][group["clip"]]
        for caption in group["captions"]:
            matched = [alike + same for _, _, line, alike, same in caption["quotes"] if line >= 0]
            both = len(caption["quotes"]) + len(clip["dialogues"])
            score = sum(matched) / both if both else 1.0
            assert score == pytest.approx(measure(caption["text"], known[clip["id"]]).dialogue_f1, abs=1e-3)
            kinds.add(round(score, 1))
    assert len(kinds) >= 3


def test_clip_is_played(run, opened):
    page = opened(run / "report.html")
    page.until("document.querySelector('video').readyState >= 2")
    assert page.evaluate("document.querySelector('video').play().then(() => true)")
    page.until("document.querySelector('video').currentTime > 0.1")


def test_untrusted_text_is_escaped(tmp_path, opened):
    folder = tmp_path / "<img src=x onerror=window.hacked=4>"
    write_run(folder, 5, 1, clips=len(HOSTILE), group=1)
    lines = lines_of(folder, 5)
    allowed = [text.replace("\ud83d ", "") for text in HOSTILE]  # manifests have no lone surrogates
    names = [f"{number} {text}" for number, text in enumerate(allowed)]
    for line, text, name in zip(lines, HOSTILE, names):
        line |= {"caption": text, "id": name, "rewards": {text: 1.0}}
    (folder / "rollouts" / "5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = [
        {
            "id": name,
            "video": f"javascript:window.hacked=5//{number}",
            "caption": text,
            "dialogues": [{"speaker": text, "text": "<b>Hello"}],
            "keypoints": [{"text": "<i>A cow", "dimension": "<u>"}] * 8,
        }
        for number, (name, text) in enumerate(zip(names, allowed))
    ]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(one) + "\n" for one in manifest))
    view(folder, "--data", tmp_path / "clips.jsonl", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("</script") == 2

    page = opened(tmp_path / "page.html")
    assert page.texts("h1") == [folder.name]
    for number, wanted in enumerate(HOSTILE):
        page.click(f".row:nth-child({number + 1})")
        shown = json.dumps(unicodedata.normalize("NFC", wanted))
        assert page.evaluate(f"document.querySelector('tr.said .caption').textContent === {shown}"), wanted
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img, b:not(.tile b, .chart b), i, u, svg[onload]').length") == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 2

    # Without the escape and the policy the page is exploited, so this test can fail.
    broken = text.replace("\\u003c", "<").replace("Content-Security-Policy", "none")
    (tmp_path / "broken.html").write_text(broken)
    page.open((tmp_path / "broken.html").as_uri())
    assert page.evaluate("window.hacked") is not None
    page.errors.clear()


def test_videos_of_a_manifest_are_linked_in_place(tmp_path, opened):
    write_run(tmp_path / "run", 2, 1, clips=2, group=1)
    records = references(2)
    (tmp_path / "films").mkdir()
    for number, record in enumerate(records):
        record["video"] = f"films/clip #{number} 100%?.mp4"
        record |= {"keypoints": [], "dialogues": []}
    write_clip(make_script(0, 0, "train", 0), tmp_path / records[0]["video"])
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    view(tmp_path / "run", "--data", tmp_path / "clips.jsonl", "--out", tmp_path / "run")
    page = opened(tmp_path / "run" / "report.html")
    page.until("document.querySelector('video').readyState >= 1")
    assert page.texts(".clip-card .caption") == [records[0]["caption"]]
    page.click(".row:nth-child(2)")
    assert page.evaluate("document.querySelector('video')") is None
    assert page.texts("#notes li")[1:] == ["1 videos are not where the manifest says"]


def test_fine_tuning_shows_heldout_captions(tmp_path, opened, capsys):
    write_run(tmp_path, 20, 0)
    shutil.rmtree(tmp_path / "rollouts")
    (tmp_path / "config.json").unlink()
    (tmp_path / "samples").mkdir()
    for step in (10, 20):
        lines = [{"step": step, "id": f"clip{k}", "caption": f"At {step}.", "reference": f"It is {k}."} for k in (1, 2)]
        (tmp_path / "samples" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view(tmp_path)
    assert "no config.json; --data names a manifest" in capsys.readouterr().err
    page = opened(tmp_path / "report.html", width=420, height=800, dark=True)
    assert page.texts("#kind option") == ["held-out captions"]
    assert page.texts(".row .clip") == ["clip1", "clip2"] * 2
    page.click(".row:nth-child(4)")
    assert page.texts(".caption") == ["It is 2.", "At 10."]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # the width of a phone
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


@pytest.mark.parametrize("width", [390, 1200])
def test_captions_fit_the_visible_part_of_a_wide_table(run, opened, width):
    page = opened(run / "report.html", width=width)
    table, captions = "document.querySelector('.table')", "[...document.querySelectorAll('.said .caption')]"
    assert page.evaluate(f"{table}.scrollWidth > {table}.clientWidth")
    page.evaluate(f"{table}.scrollLeft = 100")
    sides = page.evaluate(f"{captions}.map(node => node.getBoundingClientRect()).map(box => [box.left, box.right])")
    left, right = page.evaluate(f"(box => [box.left, box.right])({table}.getBoundingClientRect())")
    assert sides
    assert all(left <= start and end <= right for start, end in sides)


def test_page_of_a_long_run_stays_usable(tmp_path, opened):
    write_run(tmp_path, 5000, 0, world="")
    for step in range(4997, 5001):
        lines = [
            {
                "step": step,
                "id": f"clip{k // 8}",
                "group": k % 8,
                "caption": "word " * 300,
                "length": 640,
                "rewards": {"checklist": k / 1024, "dialogue": None},
                "advantage": 0,
            }
            for k in range(1024)
        ]
        (tmp_path / "rollouts" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    view(tmp_path, "--last", 3)
    assert (tmp_path / "report.html").stat().st_size < 12e6
    page = opened(tmp_path / "report.html")
    assert "Rollouts of 3 steps from 4998 to 5000; there are more" in page.texts("#notes li")[0]
    assert page.texts("#count") == ["384 clips, 3072 captions"]
    assert "mean of up to 5 steps" in page.texts("#thinned")[0]
    assert len(page.texts(".row")) == 200
    page.click("#more")
    assert len(page.texts(".row")) == 384
    page.choose("#sort", "checklist")
    assert page.texts(".row .clip")[0] == "clip127"
