"""Machines for a test: network namespaces joined by a switch. Needs root and iproute2, and nftables for a router."""

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
        address: its IPv4 address in the network of the test; its router's if it is behind one.
        switch: the namespace in which all links end.
        port: the switch's end of this machine's link.
    """

    name: str
    address: str
    switch: str
    port: str

    @property
    def prefix(self) -> list[str]:
        """The words to put before a command line so that it runs on this machine."""
        return ["ip", "netns", "exec", self.name]

    def throttle(self, megabits: int) -> None:
        """Limits what this machine sends to `megabits` Mbit/s."""
        rate = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "1mb", "latency", "50ms")
        subprocess.run([*self.prefix, "tc", "qdisc", "add", "dev", "eth0", *rate], check=True)

    def cut(self) -> None:
        """Lets nothing through to or from this machine, without either side being told."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def restore(self) -> None:
        """Undoes `cut`."""
        _ip("-n", self.switch, "link", "set", self.port, "up")


def why_not(behind_a_router: bool = False) -> str | None:
    """Why a test cannot have a network of its own on this host, or one with a router; None if it can."""
    for command, package in (("ip", "iproute2"), *([("nft", "nftables")] if behind_a_router else ())):
        if shutil.which(command) is None:
            return f"NO NETWORK TEST: {package} is not installed (apt-get install {package})"
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
def machines(count: int, behind_a_router: bool = False) -> Iterator[list[Machine]]:
    """`count` machines that can reach each other; removed at the end, with everything that still runs on them.

    Args:
        behind_a_router: the last one is in a network of its own, whose router translates addresses (NAT): it reaches
            the others, and none of them reaches it.
    """
    stem = f"hf-{os.getpid()}"
    switch, router = f"{stem}-switch", f"{stem}-router"
    made = [Machine(f"{stem}-{i}", f"10.99.0.{i + 1}", switch, f"port{i}") for i in range(count)]
    namespaces = [switch, *(machine.name for machine in made), *([router] if behind_a_router else [])]
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for machine in made:
            at_the_switch = router if behind_a_router and machine is made[-1] else machine.name
            _link(switch, machine.port, at_the_switch, f"{machine.address}/24")
            _ip("-n", switch, "link", "set", machine.port, "master", "br0", "up")
        if behind_a_router:
            _link(router, "inside", made[-1].name, "192.168.99.2/24")
            _ip("-n", router, "address", "add", "192.168.99.1/24", "dev", "inside")
            _ip("-n", router, "link", "set", "inside", "up")
            _ip("-n", made[-1].name, "route", "add", "default", "via", "192.168.99.1")
            translate = (
                "table ip nat { chain out { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }"
            )
            _in(router, "nft", translate)
            _in(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        yield made
    finally:
        for namespace in namespaces:
            inside = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
            ).stdout
            for process in inside.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _link(here: str, name: str, there: str, address: str) -> None:
    """A cable from `name` in the namespace `here` to eth0 in `there`, which gets the address."""
    _ip("-n", here, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", there)
    _ip("-n", there, "address", "add", address, "dev", "eth0")
    _ip("-n", there, "link", "set", "eth0", "up")


def _in(namespace: str, *words: str) -> None:
    _ip("netns", "exec", namespace, *words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
