"""Running the command lines of gcloud, kubectl, docker and SkyPilot, or only printing them."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a laptop needs no more of the package than its configs

from avocado_jax.errors import InputError  # noqa: E402

BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
# Patterns of the arguments that become parts of commands.
PATTERNS = {
    "name": (r"[a-z]([a-z0-9-]{0,36}[a-z0-9])?", "lower-case letters, digits and dashes, at most 38"),
    "project": (r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone, as in us-east5-a"),
    "cluster": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "the name of a GKE cluster"),
    "image": (r"[a-z0-9][a-z0-9._/-]*[a-z0-9]:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", "REGISTRY/NAME:TAG"),
    "service_account": (r"[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com", "NAME@PROJECT.iam.gserviceaccount.com"),
    "workdir": (BUCKET + r"(/[A-Za-z0-9_=.-]+)+/?", "gs://BUCKET/RUN of letters, digits and ._=-"),
}


def run(command: Sequence[str], dry: bool, cwd: str | Path = ROOT) -> None:
    """Print a command, and run it unless `dry`.

    Raises:
        InputError: it is not installed.
        subprocess.CalledProcessError: it failed.
    """
    print(shlex.join(command), flush=True)
    if not dry:
        _call(command, cwd=cwd)


def query(command: Sequence[str], dry: bool) -> str | None:
    """Print a command that changes nothing, and return its stdout; None where `dry`.

    Raises:
        InputError: it is not installed.
        subprocess.CalledProcessError: it failed.
    """
    print(shlex.join(command), flush=True)
    return None if dry else _call(command, stdout=subprocess.PIPE, text=True).stdout


def query_json(command: Sequence[str], dry: bool) -> Any:
    """As `query`, for a command that prints JSON; None also where it prints nothing."""
    text = query(command, dry)
    return json.loads(text) if text and text.strip() else None


def _call(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, check=True, **options)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not installed") from None


@contextmanager
def exported_commit(dry: bool) -> Iterator[Path]:
    """Export the commit that is checked out, and nothing else.

    Yields:
        A temporary folder with the commit as avocado.tar.gz and unpacked in tree/.

    Raises:
        InputError: there are changes that are not committed.
    """
    if dry:
        yield ROOT
        return
    if subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode:
        raise InputError("there are changes that are not committed; the hosts get the commit that is checked out")
    with tempfile.TemporaryDirectory() as folder:
        archive, tree = Path(folder, "avocado.tar.gz"), Path(folder, "tree")
        _call(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], cwd=ROOT)
        tree.mkdir()
        _call(["tar", "-xzf", str(archive), "-C", str(tree)])
        yield Path(folder)


def check_names(args: argparse.Namespace) -> None:
    """Check the arguments that become parts of commands.

    Raises:
        InputError: one does not match its pattern.
    """
    for key in PATTERNS:
        if (value := getattr(args, key, None)) is not None:
            check_name(key, value)
    if getattr(args, "slices", 1) < 1:
        raise InputError(f"--slices {args.slices}: at least 1")


def check_name(key: str, value: str) -> None:
    """Check one argument.

    Raises:
        InputError: it does not match its pattern.
    """
    pattern, meaning = PATTERNS[key]
    if not re.fullmatch(pattern, value):
        raise InputError(f"--{key.replace('_', '-')} {value!r}: not {meaning}")


def main(parser: argparse.ArgumentParser, verbs: Callable[[argparse.Namespace], None]) -> int:
    """Parse the command line and run a verb. Returns the exit status: 0, 1 a command failed, 2 bad input."""
    args, unknown = parser.parse_known_args()
    try:
        if unknown:
            raise InputError(f"unrecognized: {shlex.join(unknown)}")
        check_names(args)
        verbs(args)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        again = "; the same command continues from here" if args.verb == "start" else ""
        print(f"{parser.prog}: {error.cmd[0]} ended with status {error.returncode}{again}", file=sys.stderr)
        return 1
    return 0
