"""Runs a training command on one host of a job, and turns its end into the status that the launcher acts on.

  python -m avocado_jax.train.supervisor avocado sft CONFIG --workdir RUN ...

RUN/starts/HOST.json counts the starts of this host since the last newly finished step; `STARTS` of them end with 3.
RUN/failure.json names the host that ended with 2 or 3: the other hosts, which wait for it or are aborted by jax, end
with its status. Launchers give all hosts the same AVOCADO_LAUNCH, and each launch another: the record of an earlier
launch is ignored, and the count starts again. Without AVOCADO_LAUNCH there is no record.

Statuses: 0, 2 and 3 are final; after all others (1, 75, 128 + signal) the launcher starts all hosts again.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from avocado_jax.data import storage
from avocado_jax.errors import InputError

STARTS = 50
POLL_SECONDS = 30.0  # between looks for the record of another host's failure
RECORD_SECONDS = 10.0  # within which a host that ended has written its record, although its peers are aborted at once
ABORTED = 128 + signal.SIGABRT


def main(command: list[str]) -> int:
    """Run `command`. Returns the status for the launcher."""
    run, launch = _option(command, "--workdir"), os.environ.get("AVOCADO_LAUNCH", "")
    if run is None:
        return supervise(command, "", "")
    try:
        if (failure := read_failure(run, launch)) is not None:
            return _follow(failure)
        count = count_start(run, launch, _host(command))
    except InputError as error:
        return _print(str(error), 2)
    except OSError as error:
        return _print(f"{error}; start again later", 75)
    if count > STARTS:
        storage.delete(_starts(run, _host(command)))
        record_failure(run, launch, 3)
        return _print(f"{run}: {STARTS} starts without a newly finished step; their logs have the reason", 3)
    return supervise(command, run, launch)


def supervise(command: list[str], run: str, launch: str) -> int:
    """Run the command to its end, or until another host has failed for good. Passes SIGTERM and SIGINT on."""
    child, stopped = None, False

    def stop(*_: Any) -> None:  # the command finishes its step, saves and ends with 75
        nonlocal stopped
        stopped = True
        if child is not None:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        record_failure(run, launch, 3)
        return _print(f"{command[0]}: {error.strerror}", 3)
    if stopped:  # while the command was being started
        child.terminate()
    while True:
        try:
            status = child.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if (failure := read_failure(run, launch)) is not None:
                child.kill()  # it waits for a host that will not come back
                child.wait()
                return _follow(failure)
    status = 128 - status if status < 0 else status
    if status in (2, 3):
        record_failure(run, launch, status)
    if status in (0, 2, 3):
        return status
    until = time.monotonic() + (RECORD_SECONDS if status in (1, ABORTED) and launch else 0)
    while (failure := read_failure(run, launch)) is None and time.monotonic() < until:
        time.sleep(0.5)
    if failure is not None:
        return _follow(failure)
    if status == ABORTED:
        return _print("a host of this job was lost, or its process died; start all hosts again", 75)
    return status


def count_start(run: str, launch: str, host: str) -> int:
    """Count a start of this host. Returns how many there were since the last newly finished step, this one included.

    Raises:
        InputError, OSError: the run folder cannot be written to.
    """
    path, step = _starts(run, host), newest_step(run)
    before = _read(path) or {}
    same = before.get("launch") == launch
    count = before["count"] + 1 if same and step <= before["step"] else 1
    # A restart removes the lines behind its checkpoint: steps that are finished a second time are not new.
    newest = max(step, before["step"]) if same else step
    storage.write(path, json.dumps({"launch": launch, "count": count, "step": newest}).encode())
    return count


def newest_step(run: str) -> int:
    """The newest step in metrics.jsonl; 0 where there is none."""
    try:
        lines = storage.read(storage.join(run, "metrics.jsonl")).splitlines()
    except InputError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            continue
    return 0


def record_failure(run: str, launch: str, status: int) -> None:
    """Record that this host ended for good, unless another host has. Failing storage is reported, no more."""
    if not run or not launch or read_failure(run, launch) is not None:
        return
    record = {"launch": launch, "status": status, "host": socket.gethostname(), "time": time.time()}
    try:
        storage.write(storage.join(run, "failure.json"), json.dumps(record).encode())
    except (InputError, OSError) as error:
        _print(f"the other hosts do not learn that this one failed: {error}", status)


def read_failure(run: str, launch: str) -> dict[str, Any] | None:
    """The record of a failure in this launch; None where there is none, or the run folder cannot be read."""
    if not run or not launch:
        return None
    try:
        record = _read(storage.join(run, "failure.json"))
    except OSError:
        return None
    return record if record and record.get("launch") == launch else None


def _read(path: str) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file or it is damaged."""
    try:
        found = json.loads(storage.read(path))
    except (InputError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _starts(run: str, host: str) -> str:
    return storage.join(run, f"starts/{host}.json")


def _host(command: list[str]) -> str:
    """A name of this host that survives a restart on other machines, where the platform gives one."""
    known = os.environ.get("TPU_WORKER_ID") or os.environ.get("SKYPILOT_NODE_RANK")
    name = _option(command, "--process") or known or socket.gethostname()
    return f"{os.environ.get('MEGASCALE_SLICE_ID', '0')}-{name}"


def _option(command: list[str], name: str) -> str | None:
    for word, following in zip(command, [*command[1:], None]):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _follow(failure: dict[str, Any]) -> int:
    text = f"host {failure['host']} ended with status {failure['status']}; its log has the reason"
    return _print(text, failure["status"])


def _print(text: str, status: int) -> int:
    print(f"launch: {text}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
