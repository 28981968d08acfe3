"""Heartbeats of all hosts, and a watchdog that stops a job without progress and names the stuck host.

A host that waits in a collective does not know which host is missing. So each process publishes a counter, its host
name, step and stage in the key-value store of jax.distributed, and the watchdog compares these. It warns at half of
each timeout, so that every host has named the cause before the first one exits. jax stops processes with a lost peer.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

STAGES = ("start-up", "input", "step", "evaluation", "checkpoint")  # of a step, in order
COMPILED = "/jax/core/compile/backend_compile_duration"
PACKAGE = str(Path(__file__).parents[1])
KEYS = "avocado/liveness/"


class Beat(NamedTuple):
    """A heartbeat. `count` increases with each heartbeat, `location` is the code line of the main thread."""

    count: int
    host: str
    step: int
    stage: int
    location: str


class Liveness:
    """Publishes the heartbeats of this process and monitors its progress, in threads, until `close`.

    Args:
        heartbeat: seconds without heartbeats after which jax declares a process lost.
        step: seconds without progress after which this process exits with 75; 0: never.
        client: client of jax.distributed; None for a single process.
    """

    def __init__(self, heartbeat: float, step: float, client: Any = None, process: int = 0, processes: int = 1) -> None:
        self._heartbeat, self._limit = heartbeat, step
        self._client, self._process, self._processes = client, process, processes
        self._mine = Beat(0, socket.gethostname(), 0, 0, "")
        self._peers: dict[int, tuple[Beat, float]] = {}  # process -> (last heartbeat, time of its change)
        self._begun = self._progressed = self._answered = time.monotonic()
        self._warned: set[object] = set()
        self._closed = threading.Event()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        if client is not None:
            threading.Thread(target=self._publish, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def progress(self, step: int, stage: str) -> None:
        """Record that the main thread enters a stage of a step. Resets the time without progress."""
        self._mine = self._mine._replace(step=step, stage=STAGES.index(stage))
        self._progressed = time.monotonic()
        self._warned.discard("progress")

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()

    def lost_peers(self, patience: float) -> list[str]:
        """Wait up to `patience` seconds for new heartbeats; return the names of processes without one."""
        begun = time.monotonic()
        others = [number for number in range(self._processes) if number != self._process]
        known: dict[int, int] | None = None  # counts read after `begun`; older ones may be outdated
        while True:
            if known is None and self._answered > begun:
                known = {number: beat.count for number, (beat, _) in self._peers.items()}
            silent = [n for n in others if known is None or n not in known or self._peers[n][0].count == known[n]]
            if not silent or time.monotonic() - begun > patience:
                return [self._name(number) for number in silent]
            time.sleep(0.1)

    def _compiled(self, event: str, _: float, **__: Any) -> None:
        if event == COMPILED:
            self._progressed = time.monotonic()

    def _publish(self) -> None:
        """Publish heartbeats and read those of the other processes. Blocks while process 0 does not answer."""
        pause = 0.0  # send the first heartbeat immediately: it has the name of this host
        while not self._closed.wait(pause):
            pause = min(self._heartbeat / 8, 5.0)
            self._mine = self._mine._replace(count=self._mine.count + 1, location=_location())
            try:
                self._client.key_value_set(f"{KEYS}{self._process}", json.dumps(self._mine), allow_overwrite=True)
                found = self._client.key_value_dir_get(KEYS)
            except jax.errors.JaxRuntimeError:  # process 0 is lost: jax stops this process
                continue
            now = time.monotonic()
            for key, text in found:
                number, beat = int(key.rpartition("/")[2]), Beat(*json.loads(text))
                if number not in self._peers or self._peers[number][0].count != beat.count:
                    self._peers[number] = beat, now
                    self._warned.discard(number)
            self._answered = now  # set last: `lost_peers` reads the counts afterwards

    def _watch(self) -> None:
        limits = [limit for limit in (self._heartbeat, self._limit) if limit]
        while not self._closed.wait(min(*limits, 40.0) / 40):
            now = time.monotonic()
            if self._client is not None:
                self._warn_of_silence(now)
            idle = now - self._progressed
            if not self._limit or idle < self._limit / 2:
                continue
            if "progress" not in self._warned:
                self._warned.add("progress")
                _print(f"no progress for {idle:.0f} s (timeouts.step {self._limit:g}): {self._describe_slowest()}")
            if idle >= self._limit:
                _print(f"no progress for {idle:.0f} s, this host ends: {self._describe_slowest()}")
                faulthandler.dump_traceback(all_threads=True)
                if not self._closed.is_set():  # the run may have ended while the stacks were printed
                    os._exit(75)

    def _warn_of_silence(self, now: float) -> None:
        """Print each process without heartbeats once, before jax stops this one."""
        if now - self._answered > self._heartbeat / 2:
            silent = [0]  # process 0 does not answer: the state of the others is unknown
        else:
            peers = range(self._processes)
            silent = [number for number in peers if self._answered - self._last_beat(number) > self._heartbeat / 2]
        for number in silent:
            if number != self._process and number not in self._warned:
                self._warned.add(number)
                _print(f"{self._name(number)}: no heartbeat for {now - self._last_beat(number):.0f} s; stopped or lost")

    def _describe_slowest(self) -> str:
        """Describe the hosts that the others wait for: their step, stage and location, and those of this host."""
        beats = {number: beat for number, (beat, _) in self._peers.items()} | {self._process: self._mine}
        reached = {number: (beat.step, beat.stage) for number, beat in beats.items()}
        least, most = min(reached.values()), max(reached.values())
        missing = [number for number in range(self._processes) if number not in beats]
        late = missing or [number for number, value in reached.items() if value == least < most]
        if not late:
            stage = f"{STAGES[self._mine.stage]} of step {self._mine.step}"
            return f"no host is behind the others, all are in {stage} (here: {_location()})"
        names = ", ".join(f"{self._name(number)} ({self._describe_beat(beats.get(number))})" for number in late)
        return f"stuck: {names}; this host: {self._describe_beat(self._mine._replace(location=_location()))}"

    def _describe_beat(self, beat: Beat | None) -> str:
        return f"{STAGES[beat.stage]} of step {beat.step}, {beat.location}" if beat else "never heard of"

    def _last_beat(self, number: int) -> float:
        return self._peers[number][1] if number in self._peers else self._begun

    def _name(self, number: int) -> str:
        return f"host {number} ({self._peers[number][0].host})" if number in self._peers else f"host {number}"


_current: Liveness | None = None


def start(*args: Any) -> Liveness:
    """Create the `Liveness` of this process, which `progress` uses."""
    global _current
    _current = Liveness(*args)
    return _current


def progress(step: int, stage: str) -> None:
    """Report progress to the `Liveness` of this process, if it exists."""
    if _current is not None:
        _current.progress(step, stage)


def _location() -> str:
    """The innermost frame of this package in the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside the package"
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE + '/')}:{frame.f_lineno} {frame.f_code.co_name}"


def _print(text: str) -> None:
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # a single write, so that lines of threads do not mix
