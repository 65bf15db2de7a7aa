"""Network namespaces that a bridge joins. Their names are derived, so what exists needs no record."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NAMESPACES = Path("/run/netns")
_S = 30.0


class NetworkError(Exception):
    """A network could not be made."""


class Bridge:
    """A bridge of this machine, with namespaces that are called `BRIDGE-NAME`.

    :param name: at most eight characters, as an interface's name has 15
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.subnet = ipaddress.IPv4Network("0.0.0.0/32")

    @property
    def address(self) -> str:
        """The address of this machine on it."""
        return str(self.subnet[1])

    def make(self) -> None:
        """Makes the bridge, with a subnet that this machine does not use. :raises NetworkError:"""
        self.subnet = _free_subnet()
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "addr", "add", f"{self.address}/{self.subnet.prefixlen}", "dev", self.name)
        run("ip", "link", "set", self.name, "up")

    def add(self, name: str, address: str) -> None:
        """Makes a namespace with an address on the bridge. :raises NetworkError:"""
        namespace = f"{self.name}-{name}"
        inside = self.enter(name)
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", namespace, "master", self.name, "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "addr", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "route", "add", "default", "via", self.address)

    def enter(self, name: str) -> tuple[str, ...]:
        """Returns what runs the command that follows in a namespace, as the same process. `ip netns exec` would hide
        control groups, too."""
        return ("nsenter", f"--net={_NAMESPACES / f'{self.name}-{name}'}", "--")

    def namespaces(self) -> list[Path]:
        """Returns the namespaces that exist."""
        return sorted(_NAMESPACES.glob(f"{self.name}-*"))

    def processes(self) -> Iterator[int]:
        """Yields the processes in the namespaces."""
        for namespace in self.namespaces():
            for pid in run("ip", "netns", "pids", namespace.name).split():
                yield int(pid)

    @property
    def exists(self) -> bool:
        """Whether any of it does."""
        return Path("/sys/class/net", self.name).exists() or bool(self.namespaces())

    def remove(self) -> None:
        """Removes all of it; end its processes first. :raises NetworkError:"""
        for namespace in self.namespaces():
            run("ip", "netns", "delete", namespace.name)
        for link in json.loads(run("ip", "-j", "link")):
            # A killed `up` may have made a link and not yet its peer's network. Those of namespaces are just going.
            if link["ifname"] == self.name or link["ifname"].startswith(f"{self.name}-"):
                with suppress(NetworkError):
                    run("ip", "link", "delete", link["ifname"])
        if self.exists:
            raise NetworkError(f"the bridge {self.name} can't be removed")


def run(*command: str) -> str:
    """Returns what a command prints. :raises NetworkError: it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise NetworkError(f"{' '.join(command)} fails: {done.stderr.strip()[-500:]}")
    return done.stdout


def _free_subnet() -> ipaddress.IPv4Network:
    used = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(run("ip", "-j", "-4", "route", "show", "table", "all"))
        if route["dst"] != "default" and route.get("type") not in ("broadcast",)
    ]
    for number in range(256):
        subnet = ipaddress.IPv4Network(f"10.213.{number}.0/24")
        if not any(subnet.overlaps(each) for each in used):
            return subnet
    raise NetworkError("this machine uses all of 10.213.0.0/16, of which the fleet needs a part")
