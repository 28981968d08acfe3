"""Hosts of a slice on one machine: network namespaces, or plain processes if namespaces cannot be created.

A namespace has its own address, host name and hosts file. `lose` disconnects the network of a host before it kills the
processes, so that its connections are not closed and peers notice only by the heartbeat.
"""

import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Hosts:
    """Hosts that reach each other by name.

    Attributes:
        names: host names, resolvable on every host.
        outside: the address of this machine as the hosts reach it.
        isolated: whether each host has its own network namespace.
    """

    def __init__(self, count, folder, isolated):
        self.isolated, self._running = isolated, {}
        self._net, self._folder = f"av{os.getpid() % 100000}", folder
        self.names = [f"{self._net}-host-{number}" for number in range(count)] if isolated else ["localhost"] * count
        self.outside = f"10.213.{os.getpid() % 250}.254" if isolated else "127.0.0.1"

    def _build(self):
        net, subnet = self._net, self.outside.rpartition(".")[0]
        ip("link", "add", f"{net}b", "type", "bridge")
        ip("addr", "add", f"{self.outside}/24", "dev", f"{net}b")
        ip("link", "set", f"{net}b", "up")
        lines = ["127.0.0.1 localhost\n"]
        for number, name in enumerate(self.names):
            here, there = f"{net}h{number}", f"{net}c{number}"
            ip("netns", "add", name)
            ip("link", "add", here, "type", "veth", "peer", "name", there)
            ip("link", "set", here, "master", f"{net}b", "up")
            ip("link", "set", there, "netns", name)
            ip("-n", name, "addr", "add", f"{subnet}.{number + 1}/24", "dev", there)
            ip("-n", name, "link", "set", there, "up")
            ip("-n", name, "link", "set", "lo", "up")
            lines.append(f"{subnet}.{number + 1} {name}\n")
        Path(self._folder, "hosts").write_text("".join(lines))

    def remove(self):
        """Kill running processes and remove namespaces and links."""
        for number in list(self._running):
            self._kill(number)
        for name in self.names if self.isolated else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self._net}b"], capture_output=True, check=False)

    def start(self, number, command, env, log):
        """Start a command on a host in a new process group. Returns the process."""
        if self.isolated:
            inside = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh"]
            inside += [self.names[number], str(Path(self._folder, "hosts")), *command]
            command = ["ip", "netns", "exec", self.names[number], *inside]
        with log.open("a") as out:
            started = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        self._running[number] = started
        return started

    def lose(self, number):
        """Lose a host without warning to the others."""
        if self.isolated:
            ip("link", "set", f"{self._net}h{number}", "down")
        self._kill(number)

    def _kill(self, number):
        process = self._running.pop(number)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def hosts(count, folder):
    """Create hosts for the duration of the block."""
    isolated = os.geteuid() == 0
    made = Hosts(count, folder, isolated)
    try:
        if isolated:
            try:
                made._build()
            except (OSError, subprocess.CalledProcessError):  # no right to create namespaces
                made.remove()
                made = Hosts(count, folder, False)
        yield made
    finally:
        made.remove()
