"""The committed state in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import trio

from volant.model import (
    BASE,
    DEFAULT_PROJECT,
    Drain,
    Event,
    EventId,
    Key,
    Network,
    Project,
    Secret,
    Snapshot,
    VmRow,
    Volume,
    is_named,
    no_such_vm,
)

from ._named import KINDS, Named, Plugin, built_in, default_project

V = TypeVar("V")

_NO_MEMBERS: Mapping[str, str] = {}


class Projection:
    """The committed rows of VMs, and all other named objects.

    Everybody may read them; only the journal writes, after a commit. Between two awaits, a reader sees one consistent
    state: the state after `last_event`.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, VmRow] = {}
        self._by_key: dict[Key, VmRow] = {}
        self._named: dict[type[Named], dict[Key, Any]] = {kind: {} for kind in KINDS}
        self._members: dict[Key, Mapping[str, str]] = {}
        self._joined: dict[Key, trio.Event] = {}
        self._last_event = EventId("", 0)
        self._waiting: dict[int, trio.Event] = {}
        self._drain: Drain | None = None
        self._drain_changed = trio.Event()

    @property
    def last_event(self) -> EventId:
        """The last event that this state includes. Its epoch is empty until the journal has loaded."""
        return self._last_event

    @property
    def plugins(self) -> Mapping[Key, Plugin]:
        """The installed plugins; `plugin` also finds the built-in one. A live view."""
        return MappingProxyType(self._named[Plugin])

    @property
    def snapshots(self) -> Mapping[Key, Snapshot]:
        """The snapshots, including unfinished ones. A live view."""
        return MappingProxyType(self._named[Snapshot])

    @property
    def networks(self) -> Mapping[Key, Network]:
        """Named networks. A live view."""
        return MappingProxyType(self._named[Network])

    @property
    def volumes(self) -> Mapping[Key, Volume]:
        """The volumes, including those that are being created or deleted. A live view."""
        return MappingProxyType(self._named[Volume])

    @property
    def projects(self) -> Mapping[Key, Project]:
        """The projects that were created or limited; `project` also finds `default`. A live view."""
        return MappingProxyType(self._named[Project])

    def project(self, name: str) -> Project | None:
        """Returns a project, also `default`."""
        key = Key(name, name)
        return self._named[Project].get(key) or default_project(key)

    @property
    def secrets(self) -> Mapping[Key, Secret]:
        """The secrets, with encrypted values. A live view."""
        return MappingProxyType(self._named[Secret])

    def sees(self, project: str | None) -> Callable[[Event], bool]:
        """Returns a filter for the events of a project, or for all events with None. It leaves out events of a deleted
        project with the same name."""
        if project is None:
            return lambda event: True
        found = self.project(project)
        since = None if found is None else found.created_at
        return lambda event: event.project == project and (since is None or event.timestamp >= since)

    def named(self, kind: type[Named]) -> Mapping[Key, Any]:
        """Returns all objects of one kind. A live view."""
        return MappingProxyType(self._named[kind])

    def plugins_of(self, project: str | None) -> list[Plugin]:
        """Returns the plugins of a project, or of all projects with None. The built-in one comes first."""
        own = [plugin for key, plugin in self._named[Plugin].items() if project in (None, key.project)]
        return [Plugin(BASE, project=project or DEFAULT_PROJECT), *own]

    def plugin(self, key: Key) -> Plugin | None:
        """Returns a plugin, also `base`, which every project has."""
        return built_in(key) or self._named[Plugin].get(key)

    @property
    def drain(self) -> Drain | None:
        """The maintenance in effect, None while VMs may start."""
        return self._drain

    async def drain_is_not(self, drain: Drain | None) -> None:
        """Waits until the maintenance in effect is not `drain`."""
        while self._drain == drain:
            await self._drain_changed.wait()

    async def undrained(self) -> None:
        """Waits until VMs may start."""
        while self._drain is not None:
            await self._drain_changed.wait()

    def get(self, key: Key) -> VmRow | None:
        """Returns the row of the VM with this name."""
        return self._by_key.get(key)

    def require(self, key: Key) -> VmRow:
        """Returns the row of the VM with this name. :raises Problem: 404"""
        row = self._by_key.get(key)
        if row is None:
            raise no_such_vm(key.name[:80])
        return row

    def by_id(self, vm_id: int) -> VmRow | None:
        """Returns the row of the VM with this id."""
        return self._by_id.get(vm_id)

    def keys(self) -> KeysView[Key]:
        """Returns the keys of all VMs. A live view."""
        return self._by_key.keys()

    def rows(self) -> list[VmRow]:
        """Returns all rows, in the order of their ids."""
        return list(self._by_id.values())

    def members(self, network: Key) -> Mapping[str, str]:
        """Returns the addresses of the VMs in a named network, by their names. The mapping never changes."""
        return self._members.get(network) or _NO_MEMBERS

    async def members_are_not(self, network: Key, members: Mapping[str, str]) -> None:
        """Waits until a network has other members. Those that join and leave in between may be missed."""
        while self.members(network) == members:
            await self._joined.setdefault(network, trio.Event()).wait()

    def __len__(self) -> int:
        return len(self._by_id)

    async def changed(self, vm_id: int, revision: int) -> VmRow | None:
        """Waits until the row has another revision than `revision`. Returns it, None when it is gone.

        Revisions in between may be missed. The event log has every change of the status.
        """
        while True:
            row = self._by_id.get(vm_id)
            if row is None or row.revision != revision:
                await trio.lowlevel.checkpoint()
                return row
            await self._waiting.setdefault(vm_id, trio.Event()).wait()

    # For the journal alone

    def replace(
        self,
        rows: Iterable[VmRow],
        named: Iterable[Named],
        drain: Drain | None,
        last_event: EventId,
    ) -> None:
        """Take over what was loaded from the database."""
        self._by_id = {row.id: row for row in sorted(rows, key=lambda row: row.id)}
        self._by_key = {row.key: row for row in self._by_id.values()}
        for kept in self._named.values():
            kept.clear()
        for one in named:
            self._named[type(one)][one.key] = one
        self.set_drain(drain)
        self._last_event = last_event
        self._members = {}
        for row in self._by_id.values():
            self._join(row)
        for network in list(self._joined):
            self._joined.pop(network).set()
        for vm_id in list(self._waiting):
            self._wake(vm_id)

    def apply(
        self,
        rows: Mapping[int, VmRow | None],
        named: Mapping[type[Named], Mapping[Key, Named | None]],
        drain: Drain | None,
        last_event: EventId,
    ) -> None:
        """Take over what a commit changed; None stands for what it removed."""
        # A name may move to a new VM within one commit: all old names go before new ones are set.
        for vm_id, row in rows.items():
            old = self._by_id.get(vm_id)
            if old is not None:
                del self._by_key[old.key]
                if row is None:
                    self._leave(old)
        for vm_id, row in rows.items():
            if row is not None and vm_id not in self._by_id:
                self._join(row)
            if row is None:
                self._by_id.pop(vm_id, None)
            else:
                self._by_id[vm_id] = row
                self._by_key[row.key] = row
            self._wake(vm_id)
        for kind, changed in named.items():
            _update(self._named[kind], changed)
        self.set_drain(drain)
        self._last_event = last_event

    def set_drain(self, drain: Drain | None) -> None:
        """Set the maintenance that is in effect."""
        if drain != self._drain:
            self._drain = drain
            self._drain_changed.set()
            self._drain_changed = trio.Event()

    def _join(self, row: VmRow) -> None:
        if is_named(row.network):
            network = row.network_key
            self._set_members(network, {**self.members(network), row.name: row.ip_address})

    def _leave(self, row: VmRow) -> None:
        if is_named(row.network):
            network = row.network_key
            left = {name: address for name, address in self.members(network).items() if name != row.name}
            self._set_members(network, left)

    def _set_members(self, network: Key, members: Mapping[str, str]) -> None:
        if members:
            self._members[network] = members
        else:
            self._members.pop(network, None)
        event = self._joined.pop(network, None)
        if event is not None:
            event.set()

    def _wake(self, vm_id: int) -> None:
        event = self._waiting.pop(vm_id, None)
        if event is not None:
            event.set()


def _update(state: dict[Key, V], changes: Mapping[Key, V | None]) -> None:
    for key, value in changes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value
