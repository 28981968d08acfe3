"""Seeded faults: each must fail the fast tests that it names. Run by hand.

  python tests/mutations.py [--only TEXT]

A line of mutations.jsonl is a fault: in `path`, the passage `old`, which occurs once, becomes `new`; `tests` are
arguments of pytest. The files with these tests must pass in a clone of HEAD; then each fault is applied to the clone in
turn and its tests run. Prints `killed` or `SURVIVED` for each. Exits with 1 if one survives or its tests do not run,
with 2 if a passage is no longer in its file or a test fails without a fault.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest's status for failed tests; others, but 0, are errors of the run


def main() -> int:
    """Apply the chosen mutations one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutations with this text in their name or path")
    only = parser.parse_args().only
    mutations = map(json.loads, Path(__file__).with_suffix(".jsonl").read_text().splitlines())
    chosen = [mutation for mutation in mutations if only in mutation["name"] or only in mutation["path"]]
    stale = [one for one in chosen if (ROOT / one["path"]).read_text().count(one["old"]) != 1]
    for one in stale:
        print(f"not once in {one['path']}: {one['name']}")
    if stale or not chosen:
        return 2
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, tree], check=True)
        (ROOT / ".cache").mkdir(exist_ok=True)
        for name in (".cache", ".venv"):  # the first has compiled programs (conftest.py)
            (tree / name).symlink_to(ROOT / name)
        used = {word.partition("::")[0] for one in chosen for word in one["tests"].split() if word.startswith("tests/")}
        if _pytest(tree, f"--numprocesses auto --dist loadfile {' '.join(sorted(used))}") != 0:
            print("tests fail without a fault")
            return 2
        for one in chosen:
            path, begun = tree / one["path"], time.monotonic()
            original = path.read_text()
            path.write_text(original.replace(one["old"], one["new"]))
            status = _pytest(tree, one["tests"])
            path.write_text(original)
            survived += status != FAILED
            outcome = {FAILED: "killed", 0: "SURVIVED"}.get(status, f"NOT RUN (status {status})")
            print(f"{outcome:9} {time.monotonic() - begun:4.0f} s  {one['path']}: {one['name']}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return int(survived > 0)


def _pytest(tree: Path, tests: str) -> int:
    """The exit status of pytest in the copy, which is imported instead of the installed package."""
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, shell=True, cwd=tree, env=environment, stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
