"""Make the pictures of the README: `avocado view` of a GRPO run, and a bar chart of the table in eval/README.md.

  avocado grpo grpo_world --init avocado_jax/assets/captioner --steps 4 --group 4 --data.heldout "" --workdir RUN
  python avocado_jax/docs/make_pictures.py RUN

It needs Chromium and the packages of tests/requirements.txt.
"""

import io
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from PIL import Image

from avocado_jax.__main__ import main

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from chromium import browser  # noqa: E402

COLOR = "#3b7dd8"
PANELS = {"event recall": 1, "hallucination": 2, "Dlg.F1": 4, "RepCol": 5}  # columns of the table


def view_picture(run: str) -> bytes:
    """A screenshot of the first clip of a run's last step, with its captions."""
    assert main(["view", run, "--last", "1"]) == 0
    with browser() as page, TemporaryDirectory() as folder:
        page.open((Path(run).resolve() / "report.html").as_uri(), width=1280, height=838)
        page.until("document.querySelector('video').readyState >= 2")
        page.evaluate(
            "new Promise(done => { const video = document.querySelector('video'); video.onseeked = done;"
            "video.controls = false; video.currentTime = 2; })"
        )
        page.evaluate("document.querySelector('.row').scrollIntoView({block: 'start'})")
        page.evaluate("new Promise(done => setTimeout(done, 500))")  # until the frame is painted
        page.picture(Path(folder, "page.png"))
        left, right = page.evaluate(
            "(box => [box.left, box.right])(document.querySelector('.clip-card').getBoundingClientRect())"
        )
        out = io.BytesIO()
        Image.open(Path(folder, "page.png")).crop((int(left) - 8, 0, int(right) + 8, 838)).save(out, "png")
        return out.getvalue()


def ablation_plot() -> bytes:
    """Plot means and standard deviations of the first table under "Measured" in eval/README.md."""
    text = (HERE.parent / "eval" / "README.md").read_text().split("## Measured")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    arms = rows[2 : next(index for index, row in enumerate(rows[1:], 1) if row[0] == "" and index > 2)]
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    for axes, (title, column) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items()):
        cells = [[float(part) for part in arm[column].split("±")] for arm in arms]
        axes.barh(range(len(arms)), [cell[0] for cell in cells], color=COLOR, alpha=0.6, height=0.65)
        spread = [cell[1] if len(cell) > 1 else 0.0 for cell in cells]
        axes.errorbar([cell[0] for cell in cells], range(len(arms)), xerr=spread, fmt="none", ecolor="black", capsize=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(range(len(arms)), [arm[0] for arm in arms], fontsize=8)
    axes.invert_yaxis()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def save(picture: bytes, name: str) -> None:
    """Write a picture with a palette of 256 colors."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(HERE / name, optimize=True)
    print(HERE / name, (HERE / name).stat().st_size)


if __name__ == "__main__":
    save(ablation_plot(), "ablation.png")
    if len(sys.argv) > 1:
        save(view_picture(sys.argv[1]), "view.png")
