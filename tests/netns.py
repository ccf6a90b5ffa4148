"""Machines of a test: network namespaces joined by a switch. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One namespace.

    Args:
        name: of the namespace.
        address: its IPv4 address in the network of the test.
        switch: the namespace in which all links end.
        port: its end of this machine's link there.
    """

    name: str
    address: str
    switch: str
    port: str

    @property
    def prefix(self) -> list[str]:
        """What goes before a command line that is to run on this machine."""
        return ["ip", "netns", "exec", self.name]

    def throttle(self, megabits: int) -> None:
        """Lets this machine send so many Mbit/s at most."""
        rate = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "1mb", "latency", "50ms")
        subprocess.run([*self.prefix, "tc", "qdisc", "add", "dev", "eth0", *rate], check=True)

    def cut(self) -> None:
        """Lets nothing through to or from this machine, without a word to either side."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def restore(self) -> None:
        """Undoes `cut`."""
        _ip("-n", self.switch, "link", "set", self.port, "up")


def why_not() -> str | None:
    """Why this host lets no test have a network of its own; None if it does."""
    if shutil.which("ip") is None:
        return "NO NETWORK TEST: iproute2 is not installed (apt-get install iproute2)"
    probe = f"hf-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"NO NETWORK TEST: network namespaces are not permitted here ({error.stderr.strip()})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """`count` machines that reach each other; at the end they are gone, with all that still runs on them."""
    stem = f"hf-{os.getpid()}"
    switch = f"{stem}-switch"
    made = [Machine(f"{stem}-{i}", f"10.99.0.{i + 1}", switch, f"port{i}") for i in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for machine in made:
            _ip("netns", "add", machine.name)
            link = ("link", "add", machine.port, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("-n", switch, *link)
            _ip("-n", switch, "link", "set", machine.port, "master", "br0", "up")
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "link", "set", "eth0", "up")
            _ip("-n", machine.name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in [machine.name for machine in made] + [switch]:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for process in inside.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
