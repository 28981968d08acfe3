"""Which host is reported when a job makes no progress, and what counts as progress."""

import os
import signal
import threading
import time

import jax
import pytest

from avocado_jax.config import TimeoutConfig
from avocado_jax.parallel import liveness, processes
from avocado_jax.parallel.liveness import Liveness

Runtime = jax.errors.JaxRuntimeError


class Store:
    """A key-value store of jax.distributed that can become unavailable."""

    def __init__(self):
        self.values, self.gone = {}, False

    def key_value_set(self, key, value, allow_overwrite):
        if self.gone:
            raise Runtime("UNAVAILABLE: no coordinator")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def hosts(monkeypatch, capfd):
    """`hosts(heartbeat, step)` makes three connected hosts; `hosts.ended` lists exit statuses."""
    made, ended = [], []
    monkeypatch.setattr(liveness.os, "_exit", ended.append)
    store = Store()

    def start(heartbeat, step):
        made.extend(Liveness(heartbeat, step, store, number, 3) for number in range(3))
        return made

    start.ended, start.store = ended, store
    yield start
    for one in made:
        one.close()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_slowest_host_is_named_and_all_exit_with_75(hosts, capfd):
    made = hosts(4, 3)
    for host in made:
        host.progress(6, "step")
    for host in (made[0], made[2]):
        host.progress(7, "step")
    made[1].progress(7, "input")
    until(lambda: len(hosts.ended) >= 3)
    assert set(hosts.ended) == {75}
    output = capfd.readouterr().err
    warnings = [line for line in output.splitlines() if "(timeouts.step 3): stuck: host 1 (" in line]
    assert len(warnings) == 3  # each host reports it once, long before it exits
    assert all("input of step 7, outside the package" in line for line in warnings)
    assert "Current thread" in output  # stacks
    assert "host 2" not in output


def test_no_host_is_named_if_all_are_at_the_same_position(hosts, capfd):
    for host in hosts(4, 1):
        host.progress(3, "step")
    until(lambda: hosts.ended)
    assert "no host is behind the others, all are in step of step 3" in capfd.readouterr().err


def test_host_without_heartbeats_is_named(hosts, capfd):
    made = hosts(2, 0)
    until(lambda: made[0]._peers.keys() == {0, 1, 2})
    made[1].close()
    time.sleep(1.6)
    hosts.store.gone = True  # then process 0 cannot be reached
    time.sleep(1.6)
    output = [line for line in capfd.readouterr().err.splitlines() if line.startswith("host ")]  # XLA may warn too
    silent = [line.partition(":")[0].split(" (")[0] for line in output]
    assert silent.count("host 1") == 2  # host 0 and host 2 name it
    assert silent.count("host 0") == 1  # host 2
    assert "host 2" not in silent
    assert all("no heartbeat for" in line for line in output)
    assert not hosts.ended  # jax handles this


@pytest.mark.parametrize("what", ["progress", "compilation"])
def test_progress_and_compilations_extend_the_timeout(hosts, what):
    made = hosts(10, 3)  # seconds: more than a step of this loop takes on a busy machine, less than the loop
    for number in range(8):
        time.sleep(0.45)
        if what == "compilation":
            jax.jit(lambda x, number=number: x + number).lower(1.0).compile()
        else:
            for host in made:
                host.progress(number, "input")
    assert not hosts.ended
    until(lambda: hosts.ended)


def test_lost_peers(hosts):
    made = hosts(0.4, 0)
    until(lambda: made[0]._peers.keys() == {0, 1, 2})
    assert made[0].lost_peers(5) == []
    made[2].close()
    time.sleep(0.2)
    (lost,) = made[0].lost_peers(1)
    assert lost.startswith("host 2 (")


def test_resumed_host_ignores_stale_heartbeats(hosts):
    """The first values that it reads may have been sent before the others ended."""
    made = hosts(0.4, 0)
    until(lambda: made[0]._peers.keys() == {0, 1, 2})
    values = hosts.store.values
    hosts.store.values = {key: value.replace("[", "[1", 1) for key, value in values.items()}  # new counts, once
    hosts.store.key_value_set = lambda *_, **__: None
    assert len(made[0].lost_peers(1)) == 2


@pytest.mark.parametrize(
    ("error", "lost", "status", "kind"),
    [
        (Runtime("INTERNAL: gloo: connection closed by peer"), ["host 1 (h)"], 1, ConnectionError),
        (Runtime("INTERNAL: gloo: connection closed by peer"), [], 3, Runtime),
        (ValueError("UNKNOWN: Gloo all-reduce failed"), ["host 1 (h)"], 1, ConnectionError),
        (Runtime("UNAVAILABLE: x"), [], 1, Runtime),
        (Runtime("RESOURCE_EXHAUSTED: x"), ["host 1 (h)"], 3, Runtime),
        (KeyError("a bug"), ["host 1 (h)"], 3, KeyError),
        (processes.InputError("data: none"), ["host 1 (h)"], 2, processes.InputError),
    ],
)
def test_error_after_a_lost_host_is_retriable(monkeypatch, error, lost, status, kind):
    left = []
    monkeypatch.setattr(processes, "_initialize", lambda *_: None)
    monkeypatch.setattr(processes, "_exit_soon", left.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(Liveness, "lost_peers", lambda self, patience: lost)
    with pytest.raises(kind), processes.init_distributed("h:1", 2, 0, None, TimeoutConfig(step=0)):
        raise error
    assert left == [status]


@pytest.mark.parametrize("failing", ["_initialize", "liveness.start"])
def test_failed_start_restores_the_signal_handlers(monkeypatch, failing):
    """Otherwise a later SIGTERM ends this process with 75."""

    def fail(*_):
        raise OSError("a port in use")

    monkeypatch.setattr(processes, "_initialize", lambda *_: None)
    monkeypatch.setattr(f"avocado_jax.parallel.processes.{failing}", fail)
    handler, descriptor = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    with (
        pytest.raises(OSError, match="in use"),
        processes.init_distributed("h:1", 2, 0, None, TimeoutConfig(step=0)),
    ):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(descriptor)) == (handler, descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_before_the_first_step_exits_at_once(monkeypatch, capsys, number):
    """From a thread: the main thread may be in the compiler."""
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), ended.set()))
    with processes.init_distributed(None, None, None, None, TimeoutConfig(step=0)):
        assert signal.getsignal(number) not in (signal.default_int_handler, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        assert ended.wait(60)
    assert statuses == [75]
    assert capsys.readouterr().err == f"stopped by {number.name}; the same command resumes\n"
