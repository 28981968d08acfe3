"""Run a training command on one host of a job, and convert its exit status for the launcher.

  python -m avocado_jax.train.supervisor avocado sft CONFIG --workdir RUN ...

RUN/starts/HOST.json counts the starts of this host since the last new step. After `STARTS` of them the status is 3.
RUN/failure.json names the host that exited with 2 or 3. The other hosts, which wait for it or are aborted by jax, exit
with the same status. AVOCADO_LAUNCH is the same on all hosts and differs between launches: records of earlier launches
are ignored, and the count restarts. Without AVOCADO_LAUNCH failures are not recorded.

Statuses 0, 2 and 3 are final. After other statuses (1, 75, 128 + signal) the launcher restarts all hosts.
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
POLL_SECONDS = 30.0  # interval for reading the failure record
RECORD_SECONDS = 10.0  # time to wait for the failure record of another host: peers are aborted before it is written
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
    """Run the command until it exits, or until another host has failed permanently. Forwards SIGTERM and SIGINT."""
    child, stopped = None, False

    def stop(*_: Any) -> None:  # the command finishes its step, saves and exits with 75
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
    if stopped:  # a signal arrived before `child` was set
        child.terminate()
    while True:
        try:
            status = child.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if (failure := read_failure(run, launch)) is not None:
                child.kill()  # it waits for the failed host
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
    """Count a start of this host. Returns the number of starts since the last new step, including this one.

    Raises:
        InputError, OSError: the run folder cannot be written to.
    """
    path, step = _starts(run, host), newest_step(run)
    before = _read(path) or {}
    same = before.get("launch") == launch
    count = before["count"] + 1 if same and step <= before["step"] else 1
    # A restart removes the lines after its checkpoint. Steps that are repeated are not new.
    newest = max(step, before["step"]) if same else step
    storage.write(path, json.dumps({"launch": launch, "count": count, "step": newest}).encode())
    return count


def newest_step(run: str) -> int:
    """The newest step in metrics.jsonl; 0 if there is none."""
    try:
        lines = storage.read(storage.join(run, "metrics.jsonl")).splitlines()
    except InputError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a truncated line
            continue
    return 0


def record_failure(run: str, launch: str, status: int) -> None:
    """Record a permanent failure of this host, unless one is recorded. Storage errors are only printed."""
    if not run or not launch or read_failure(run, launch) is not None:
        return
    record = {"launch": launch, "status": status, "host": socket.gethostname(), "time": time.time()}
    try:
        storage.write(storage.join(run, "failure.json"), json.dumps(record).encode())
    except (InputError, OSError) as error:
        _print(f"the other hosts do not learn that this one failed: {error}", status)


def read_failure(run: str, launch: str) -> dict[str, Any] | None:
    """The failure record of this launch; None if there is none, or the run folder cannot be read."""
    if not run or not launch:
        return None
    try:
        record = _read(storage.join(run, "failure.json"))
    except OSError:
        return None
    return record if record and record.get("launch") == launch else None


def _read(path: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged."""
    try:
        found = json.loads(storage.read(path))
    except (InputError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _starts(run: str, host: str) -> str:
    return storage.join(run, f"starts/{host}.json")


def _host(command: list[str]) -> str:
    """A name of this host. If the platform has host indices, it is stable over restarts on other machines."""
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
