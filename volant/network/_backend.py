"""What the host's side of networks asks of the operating system: links, addresses, routes, switches, one firewall.

Narrow on purpose: whoever simulates a host needs a dictionary of links, and no netlink. What is asked for is data, so
that what is to be done can be decided, and tested, without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec


class NetworkFailed(Exception):
    """The host's side of a network can't be had. `code` is a stable word, the text says what, where, and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BridgeDown(NetworkFailed):
    """The bridge that something is to be done with is not there, or not up: somebody else has had a hand in it."""

    def __init__(self, name: str) -> None:
        super().__init__("bridge_down", f"the bridge {name} is not there, or not up")


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface."""

    name: str
    kind: str
    """`bridge`, `tun`, …; empty for one that is no virtual one."""
    mac: str
    up: bool
    master: str = ""
    """The name of the bridge that it is a port of."""
    in_use: bool = False
    """Whether a process has it open, for a tap."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the host's."""

    destination: str
    """With its prefix."""
    device: str

    def __str__(self) -> str:
        return f"{self.destination} dev {self.device}"


class MakeBridge(msgspec.Struct, frozen=True, kw_only=True):
    """A bridge, up, with these addresses and no others, and forwarding for what comes from it and what answers that.
    One that is there gets what it lacks."""

    name: str
    mac: str
    addresses: tuple[str, ...]
    """With their prefixes."""


class MakeTap(msgspec.Struct, frozen=True, kw_only=True):
    """A tap that outlives us, that we may open and no other user, a port of that bridge, up. One that is there gets
    what it lacks; but who has it open already, has it."""

    name: str
    bridge: str


class RemoveLink(msgspec.Struct, frozen=True, kw_only=True):
    """No link of this name and kind. There being none is no failure."""

    name: str
    kind: str


class SetLocalnet(msgspec.Struct, frozen=True, kw_only=True):
    """Whether what the host sends from 127.0.0.1 may leave by this bridge, and be answered."""

    bridge: str
    on: bool


class ForgetConnections(msgspec.Struct, frozen=True, kw_only=True):
    """The host's firewall tracks no connection of this address any more, neither from it nor to it."""

    address: str


Step = MakeBridge | MakeTap | RemoveLink | SetLocalnet | ForgetConnections


class NetworkBackend(Protocol):
    """Each call but `watch` has a deadline of its own. :raises NetworkFailed: it has passed, or the host refuses."""

    async def ready(self) -> None:
        """:raises NetworkFailed: nothing can be made here, whatever it is, and why."""
        ...

    async def names(self) -> Collection[str]:
        """The names of all links of the host: cheap, and open to everybody."""
        ...

    async def links(self, names: Collection[str] | None = None) -> Sequence[Link]:
        """Those of these names that there are, at a price that does not grow with the others; None: all of the host."""
        ...

    async def routes(self) -> Sequence[Route]:
        """The host's IPv4 routes, but for those into the world."""
        ...

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        """Do one after the other, also when one fails; what came of each."""
        ...

    async def check(self, rules: str) -> None:
        """Whether nftables would take such rules here. Nothing is changed."""
        ...

    async def load(self, rules: str) -> None:
        """Hand rules to nftables, which takes all of them in one transaction, or none."""
        ...

    async def watch(self, bridge: str, tables: Collection[str], torn: Callable[[str], None]) -> None:
        """Call `torn` each time that somebody has taken the bridge or one of the firewall's tables away, with what has
        happened; without an end."""
        ...
