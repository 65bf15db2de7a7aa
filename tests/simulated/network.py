"""The simulated machine's networks: links, routes, and a firewall that knows which elements its sets have."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from actors import fault
from volant.network import (
    BridgeDown,
    ForgetConnections,
    Link,
    MakeBridge,
    MakeTap,
    NetworkFailed,
    RemoveLink,
    Route,
    SetLocalnet,
    Step,
)

T = TypeVar("T")


class Call(Protocol):
    """Makes a call with an effect; see `Calls.run`."""

    def __call__(self, effect: Callable[[], T], /) -> Awaitable[T]: ...


_LINE = re.compile(r"(?:(add|delete) )?(table|element) (.+?)(?: \{(?: (.*) \})?)?")
"""The first line of a block creates the table."""
_OBJECT = re.compile(r"(add|delete) (chain|set|counter) (\S+ \S+) (\S+)(?: \{.*\})?")
"""What egress rules of a VM consist of, besides elements."""


@dataclass
class SimLinks:
    """The links, routes and firewall of the machine."""

    links: dict[str, Link] = field(default_factory=dict)
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Addresses of bridges."""
    routes: list[Route] = field(default_factory=list)
    """Routes, but for those of the bridges."""
    localnet: set[str] = field(default_factory=set)
    elements: dict[str, dict[str, str]] = field(default_factory=dict)
    """Elements of the firewall's sets, by table and name. An empty set may be missing."""
    tables: set[str] = field(default_factory=set)
    objects: set[tuple[str, str, str]] = field(default_factory=set)
    """Table, kind and name of chains, sets and counters that were added to a table."""
    watchers: list[Callable[[str], None]] = field(default_factory=list)
    """Called when a bridge or the firewall is removed."""

    def power_cut(self) -> None:
        """Removes everything, as all of it is in memory."""
        self.links.clear()
        self.addresses.clear()
        self.localnet.clear()
        self.elements.clear()
        self.tables.clear()
        self.objects.clear()

    def do(self, step: Step) -> None:
        """:raises NetworkFailed: as the kernel would."""
        match step:
            case MakeBridge(name=name, mac=mac, addresses=addresses):
                self.links[name] = Link(name=name, kind="bridge", mac=mac, up=True)
                self.addresses[name] = addresses
            case MakeTap(name=name, bridge=bridge):
                if bridge not in self.links or not self.links[bridge].up:
                    raise BridgeDown(bridge)
                self.links[name] = self._tap(name, master=bridge, up=True)
            case RemoveLink(name=name):
                self.links.pop(name, None)
                self.addresses.pop(name, None)
                self.localnet.discard(name)
            case ForgetConnections():
                pass  # No packet passes here, so no connection is tracked.
            case SetLocalnet(bridge=bridge, on=on):
                if bridge not in self.links:
                    raise BridgeDown(bridge)
                (self.localnet.add if on else self.localnet.discard)(bridge)

    def do_half(self, step: Step) -> None:
        """Does the first part of a step, as a kernel that fails in the middle."""
        match step:
            case MakeBridge(name=name, mac=mac) if name not in self.links:
                self.links[name] = Link(name=name, kind="bridge", mac=mac, up=False)
                self.addresses[name] = ()
            case MakeTap(name=name) if name not in self.links:
                self.links[name] = self._tap(name, master="", up=False)
            case RemoveLink(name=name) if name in self.links:
                self.links[name] = msgspec.structs.replace(self.links[name], up=False)

    def _tap(self, name: str, *, master: str, up: bool) -> Link:
        before = self.links.get(name)
        in_use = before is not None and before.in_use
        return Link(name=name, kind="tun", mac="", up=up, master=master, in_use=in_use)

    def take_away_bridges(self) -> None:
        """Removes all bridges, as an operator may."""
        for name in [link.name for link in self.links.values() if link.kind == "bridge"]:
            self.do(RemoveLink(name=name, kind="bridge"))
            for tap in [link for link in self.links.values() if link.master == name]:
                self.links[tap.name] = msgspec.structs.replace(tap, master="")
            self._notify(f"the bridge {name} was removed")

    def take_away_firewall(self) -> None:
        """As `flush ruleset` does."""
        self.tables.clear()
        self.elements.clear()
        self.objects.clear()
        self._notify("the firewall was flushed")

    def _notify(self, what: str) -> None:
        for notify in tuple(self.watchers):
            notify(what)

    def load(self, rules: str) -> None:
        """Loads rules, all or nothing. :raises NetworkFailed: an element to be deleted does not exist."""
        tables, elements = set(self.tables), {name: dict(held) for name, held in self.elements.items()}
        objects = set(self.objects)
        for line in rules.splitlines():
            found = _OBJECT.fullmatch(line)
            if found is not None:
                verb, kind, table, name = found.groups()
                if table not in tables or (verb == "delete" and (table, kind, name) not in objects):
                    raise NetworkFailed("firewall", f"there is no {table} {kind} {name}")
                (objects.add if verb == "add" else objects.discard)((table, kind, name))
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                continue
            verb, what, name, members = match.groups()
            if what == "table" and verb != "delete":
                tables.add(name)
            elif what == "table":
                tables.discard(name)
                elements = {held: of for held, of in elements.items() if not held.startswith(f"{name} ")}
                objects = {each for each in objects if each[0] != name}
            elif name.rpartition(" ")[0] not in tables:
                raise NetworkFailed("firewall", f"there is no table for {name}")
            else:
                _change(elements.setdefault(name, {}), verb, members.split(", "))
        self.objects = objects
        self.tables, self.elements = tables, {name: held for name, held in elements.items() if held}


def _change(held: dict[str, str], verb: str, members: list[str]) -> None:
    for member in members:
        key, _, value = member.partition(" : ")
        if verb == "add":
            held[key] = value
        elif held.pop(key, None) is None:
            raise NetworkFailed("firewall", f"there is no {key}")


class SimNetwork:
    """The network backend of one daemon. `call` makes each of its effects happen, or not."""

    def __init__(self, links: SimLinks, call: Call) -> None:
        self._links = links
        self._call = call

    async def ready(self) -> None:
        await self._call(lambda: None)

    async def names(self) -> Collection[str]:
        return await self._call(lambda: list(self._links.links))

    async def links(self, names: Collection[str] | None = None) -> Sequence[Link]:
        def read() -> list[Link]:
            return [link for name, link in self._links.links.items() if names is None or name in names]

        return await self._call(read)

    async def uplinks(self) -> Collection[str]:
        return await self._call(lambda: ["eth0"])

    async def routes(self) -> Sequence[Route]:
        def read() -> list[Route]:
            ours = [
                Route(destination=str(IPv4Interface(address).network), device=bridge)
                for bridge, addresses in self._links.addresses.items()
                for address in addresses
            ]
            return self._links.routes + ours

        return await self._call(read)

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        return [await self._do(step) for step in steps]

    async def _do(self, step: Step) -> NetworkFailed | None:
        def do() -> None:
            if fault("network.refuses"):
                raise NetworkFailed("tap", os.strerror(errno.EBUSY))
            if fault("network.does_half"):
                self._links.do_half(step)
                raise NetworkFailed("tap", os.strerror(errno.ENOMEM))
            if isinstance(step, MakeTap) and fault("bridge.goes"):
                self._links.take_away_bridges()
            self._links.do(step)
            if fault("network.answer_is_lost"):
                # A retry finds that the step is done.
                raise NetworkFailed("timeout", "the simulated kernel did not answer")

        try:
            await self._call(do)
        except NetworkFailed as error:
            return error
        return None

    async def check(self, rules: str) -> None:
        await trio.lowlevel.checkpoint()

    async def load(self, rules: str) -> None:
        def load() -> None:
            if fault("firewall.refuses"):
                raise NetworkFailed("firewall", "the simulated firewall refuses")
            self._links.load(rules)

        await self._call(load)

    async def listed(self, what: str) -> Sequence[Mapping[str, Any]]:
        table = what.partition("table ")[2]

        def read() -> list[Mapping[str, Any]]:
            if fault("firewall.cannot_be_read"):
                raise NetworkFailed("firewall", "the simulated firewall can't be read")
            if table not in self._links.tables:
                return []
            return [{"table": {"name": table}}] + [
                {"counter": {"name": name, "packets": 0, "bytes": 0}}
                for held, kind, name in sorted(self._links.objects)
                if held == table and kind == "counter"
            ]

        return await self._call(read)

    async def watch(self, bridge: str, tables: Collection[str], on_loss: Callable[[str], None]) -> None:
        self._links.watchers.append(on_loss)
        try:
            await trio.sleep_forever()
        finally:
            self._links.watchers.remove(on_loss)
