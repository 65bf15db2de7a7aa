"""The committed state in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import TypeVar

import msgspec
import trio

from volant.model import BASE, Drain, EventId, Manifest, Network, PluginView, Snapshot, VmRow, is_named, no_such_vm


class Plugin(msgspec.Struct, frozen=True):
    """An installed plugin. `base` is built in and has no `created_at`."""

    manifest: Manifest
    enabled: bool = True
    created_at: datetime | None = None

    @property
    def name(self) -> str:
        return self.manifest.name


def plugin_view(plugin: Plugin) -> PluginView:
    """Returns what clients see of `plugin`."""
    manifest = plugin.manifest
    return PluginView(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        runtime=manifest.runtime,
        enabled=plugin.enabled,
        builtin=plugin.created_at is None,
        created_at=plugin.created_at,
        labels=manifest.labels,
    )


BASE_PLUGIN = Plugin(BASE)


V = TypeVar("V")

_NO_MEMBERS: Mapping[str, str] = {}


class Projection:
    """Holds the committed rows, plugins, snapshots and networks. Everybody may read; only the journal writes, after a
    commit.

    Between two awaits, a reader sees one consistent state: that after `last_event`.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, VmRow] = {}
        self._by_name: dict[str, VmRow] = {}
        self._plugins: dict[str, Plugin] = {BASE.name: BASE_PLUGIN}
        self._snapshots: dict[str, Snapshot] = {}
        self._networks: dict[str, Network] = {}
        self._members: dict[str, Mapping[str, str]] = {}
        self._joined: dict[str, trio.Event] = {}
        self._last_event = EventId("", 0)
        self._waiting: dict[int, trio.Event] = {}
        self._drain: Drain | None = None
        self._drain_changed = trio.Event()

    @property
    def last_event(self) -> EventId:
        """The last event that this state includes. Its epoch is empty until the journal has loaded."""
        return self._last_event

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """By name, also `base`. A live view."""
        return MappingProxyType(self._plugins)

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        """By name, also those that are being taken. A live view."""
        return MappingProxyType(self._snapshots)

    @property
    def networks(self) -> Mapping[str, Network]:
        """Named networks, by name. A live view."""
        return MappingProxyType(self._networks)

    @property
    def drain(self) -> Drain | None:
        """The maintenance that is in effect; None: VMs may start."""
        return self._drain

    async def drain_is_not(self, drain: Drain | None) -> None:
        """Waits until the maintenance in effect is not `drain`."""
        while self._drain == drain:
            await self._drain_changed.wait()

    async def undrained(self) -> None:
        """Waits until VMs may start."""
        while self._drain is not None:
            await self._drain_changed.wait()

    def get(self, name: str) -> VmRow | None:
        """Returns the row of the VM with this name."""
        return self._by_name.get(name)

    def require(self, name: str) -> VmRow:
        """Returns the row of the VM with this name. :raises Problem: 404"""
        row = self._by_name.get(name)
        if row is None:
            raise no_such_vm(name[:80])
        return row

    def by_id(self, vm_id: int) -> VmRow | None:
        """Returns the row of the VM with this id."""
        return self._by_id.get(vm_id)

    def rows(self) -> list[VmRow]:
        """Returns all rows, in the order of their ids."""
        return list(self._by_id.values())

    def members(self, network: str) -> Mapping[str, str]:
        """Returns the addresses of the VMs in a network by name. The mapping never changes."""
        return self._members.get(network) or _NO_MEMBERS

    async def members_are_not(self, network: str, members: Mapping[str, str]) -> None:
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
        plugins: Iterable[Plugin],
        snapshots: Iterable[Snapshot],
        networks: Iterable[Network],
        drain: Drain | None,
        last_event: EventId,
    ) -> None:
        """Take over what was loaded from the database."""
        self._by_id = {row.id: row for row in sorted(rows, key=lambda row: row.id)}
        self._by_name = {row.name: row for row in self._by_id.values()}
        self._plugins = {BASE.name: BASE_PLUGIN} | {plugin.name: plugin for plugin in plugins}
        self._snapshots = {snapshot.name: snapshot for snapshot in snapshots}
        self._networks = {network.name: network for network in networks}
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
        plugins: Mapping[str, Plugin | None],
        snapshots: Mapping[str, Snapshot | None],
        networks: Mapping[str, Network | None],
        drain: Drain | None,
        last_event: EventId,
    ) -> None:
        """Take over what a commit changed; None stands for what it removed."""
        # A name may move to a new VM within one commit: all old names go before new ones are set.
        for vm_id, row in rows.items():
            old = self._by_id.get(vm_id)
            if old is not None:
                del self._by_name[old.name]
                if row is None:
                    self._leave(old)
        for vm_id, row in rows.items():
            if row is not None and vm_id not in self._by_id:
                self._join(row)
            if row is None:
                self._by_id.pop(vm_id, None)
            else:
                self._by_id[vm_id] = row
                self._by_name[row.name] = row
            self._wake(vm_id)
        _update(self._plugins, plugins)
        _update(self._snapshots, snapshots)
        _update(self._networks, networks)
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
            self._set_members(row.network, {**self.members(row.network), row.name: row.ip_address})

    def _leave(self, row: VmRow) -> None:
        if is_named(row.network):
            left = {name: address for name, address in self.members(row.network).items() if name != row.name}
            self._set_members(row.network, left)

    def _set_members(self, network: str, members: Mapping[str, str]) -> None:
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


def _update(state: dict[str, V], changes: Mapping[str, V | None]) -> None:
    for name, value in changes.items():
        if value is None:
            state.pop(name, None)
        else:
            state[name] = value
