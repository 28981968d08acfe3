"""The plans that the launchers check a job against (plans.json), and the table of them in README.md.

  python launch/plans.py            # print the table
  python launch/plans.py --write    # replace the table in README.md

Each plan is a result of `avocado plan`. Fields: config, topology, fields (as on the command line), fits, gib (of one
chip), limit_gib, and where it fits seconds (of a step), bound and mfu.
"""

import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from avocado_jax.config import flat, load  # noqa: E402
from avocado_jax.errors import InputError  # noqa: E402

# Fields that decide how much memory and time a step takes: a plan holds for all configs in which these are equal.
PLANNED = re.compile(
    r"batch|accumulate|train|(param_|frozen_|reference_)?dtype|remat|attention|group|split|rollout_(batches|int8)"
    r"|passes|minibatches|(mesh|lora|nominal)\..*|data\.(references|caption_tokens)|sampling\.tokens|objective\.beta"
)
TABLE = re.compile(r"(<!-- printed by launch/plans.py -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "| command | fits | GiB a chip | of | step | bound | MFU | hours | chip-hours |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
CLIPS = {"SftConfig": 106_959, "GrpoConfig": 2_000}  # of the paper, for hours and chip-hours


def read_plans() -> list[dict[str, Any]]:
    """The plans of plans.json."""
    return json.loads((HERE / "plans.json").read_text())


def find_plan(path: str, topology: str, fields: Sequence[str]) -> str:
    """Find the plan of a config on a slice.

    Args:
        path: a file of configs/.
        topology: the slice, such as v5p:4x4x4.
        fields: changed fields, as on the command line.

    Returns:
        What a step takes, in one line.

    Raises:
        InputError: it does not fit, or there is no plan of it.
    """
    wanted = _planned_fields(path, fields)
    for plan in read_plans():
        if plan["config"] == path and plan["topology"] == topology and _planned_fields(path, plan["fields"]) == wanted:
            if not plan["fits"]:
                raise InputError(f"{path} does not fit {topology}: {plan['gib']} of {plan['limit_gib']} GiB a chip")
            return f"{plan['gib']} of {plan['limit_gib']} GiB a chip, at most {plan['seconds']} s a step"
    changed = [word for name, value in changes(fields) if PLANNED.fullmatch(name) for word in (f"--{name}", value)]
    command = shlex.join(["avocado", "plan", path, "--topology", topology, *changed])
    raise InputError(f"launch/plans.json has no plan of this: run `{command}` and add its result, or pass --unplanned")


def changes(fields: Sequence[str]) -> list[tuple[str, str]]:
    """Fields of the command line (--a.b value, --a.b=value) as (name, value)."""
    words = [part for field in fields for part in (field.split("=", 1) if field.startswith("--") else [field])]
    return [(name.removeprefix("--"), value) for name, value in zip(words[::2], words[1::2])]


def table() -> str:
    """The plans as a Markdown table."""
    return HEAD + "".join(_row(plan) for plan in read_plans())


def steps(path: str, fields: Sequence[str]) -> int:
    """The steps of a config with the clips of the paper."""
    config = load(str(HERE.parent / path), list(fields))
    return math.ceil(config.epochs * CLIPS[type(config).__name__] / config.batch)


def _row(plan: dict[str, Any]) -> str:
    command = shlex.join(["avocado", "plan", plan["config"], "--topology", plan["topology"], *plan["fields"]])
    fits = "yes" if plan["fits"] else "no"
    step = f"{plan['seconds']} s" if plan["fits"] else "-"
    hours = steps(plan["config"], plan["fields"]) * plan.get("seconds", 0) / 3600
    chips = math.prod(map(int, plan["topology"].partition(":")[2].split("x")))
    mfu = f"{plan['mfu']:.0%}" if "mfu" in plan else "-"
    hours, chip_hours = (f"{hours:.1f}", f"{chips * hours:.0f}") if plan["fits"] else ("-", "-")
    cells = [f"`{command}`", fits, plan["gib"], f"{plan['limit_gib']:g}", step, plan.get("bound", "-"), mfu]
    cells += [hours, chip_hours]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _planned_fields(path: str, fields: Sequence[str]) -> dict[str, Any]:
    config = load(str(HERE.parent / path), list(fields))
    return {name: value for name, value, _ in flat(config) if PLANNED.fullmatch(name)}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        readme = HERE / "README.md"
        readme.write_text(TABLE.sub(lambda found: found[1] + table() + found[2], readme.read_text()))
    else:
        print(table(), end="")
