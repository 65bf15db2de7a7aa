"""The network package's interface to the operating system: links, addresses, routes, switches and a firewall.

The protocol is narrow, so that a simulated host needs no netlink. Changes are data, so that they can be decided and
tested without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec


class NetworkFailed(Exception):
    """A network can't be set up. `code` is stable; the text says what failed, why, and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BridgeDown(NetworkFailed):
    """The daemon's bridge is missing or down, because something else on the host changed it."""

    def __init__(self, name: str) -> None:
        super().__init__("bridge_down", f"the bridge {name} is missing or down")


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface."""

    name: str
    kind: str
    """`bridge`, `tun`, …; empty for a physical interface."""
    mac: str
    up: bool
    master: str = ""
    """The bridge of which it is a port."""
    in_use: bool = False
    """Whether a process has it open, for a tap."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the host."""

    destination: str
    """The destination with its prefix length."""
    device: str

    def __str__(self) -> str:
        return f"{self.destination} dev {self.device}"


class MakeBridge(msgspec.Struct, frozen=True, kw_only=True):
    """Creates a bridge, or corrects an existing one: up, with exactly these addresses, and with forwarding for packets
    from it and for their answers."""

    name: str
    mac: str
    addresses: tuple[str, ...]
    """The addresses with their prefix lengths."""


class MakeTap(msgspec.Struct, frozen=True, kw_only=True):
    """Creates a permanent tap, or corrects an existing one: up, a port of the bridge, and only for the daemon's user to
    open. A process that has it open keeps it."""

    name: str
    bridge: str


class RemoveLink(msgspec.Struct, frozen=True, kw_only=True):
    """Removes the link of this name and kind, if there is one."""

    name: str
    kind: str


class SetLocalnet(msgspec.Struct, frozen=True, kw_only=True):
    """Sets `route_localnet`: whether packets from 127.0.0.1 may leave by this bridge, and their answers arrive."""

    bridge: str
    on: bool


class ForgetConnections(msgspec.Struct, frozen=True, kw_only=True):
    """Removes the tracked connections from and to this address."""

    address: str


Step = MakeBridge | MakeTap | RemoveLink | SetLocalnet | ForgetConnections


class NetworkBackend(Protocol):
    """The operating system's networks. Each call but `watch` has a deadline of its own.

    :raises NetworkFailed: when the deadline passes or the host refuses.
    """

    async def ready(self) -> None:
        """Checks the host. :raises NetworkFailed: it lacks something that every network needs."""
        ...

    async def names(self) -> Collection[str]:
        """Returns the names of all links. This is cheap and needs no rights."""
        ...

    async def links(self, names: Collection[str] | None = None) -> Sequence[Link]:
        """Returns those of these links that exist; None for all links. The cost grows only with `names`."""
        ...

    async def routes(self) -> Sequence[Route]:
        """Returns the host's IPv4 routes except the default routes."""
        ...

    async def uplinks(self) -> Collection[str]:
        """Returns the interfaces from which the host routes packets only for guests: those of its default routes,
        unless it is a router anyway (`net.ipv4.ip_forward`)."""
        ...

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        """Runs all steps in order, even when one fails. Returns the failure of each."""
        ...

    async def check(self, rules: str) -> None:
        """Asks nftables whether it accepts these rules. Changes nothing."""
        ...

    async def load(self, rules: str) -> None:
        """Loads rules into nftables in one transaction."""
        ...

    async def listed(self, what: str) -> Sequence[Mapping[str, Any]]:
        """Returns the output of `nft -j list` for an object such as `table inet t`, one mapping for each part. Empty if
        there is no such object."""
        ...

    async def watch(self, bridge: str, tables: Collection[str], on_loss: Callable[[str], None]) -> None:
        """Calls `on_loss` with a description whenever the bridge or one of the tables is removed. Never returns."""
        ...
