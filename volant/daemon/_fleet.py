"""The daemon's part in a fleet: this host's membership, and the port for the other hosts.

Only a daemon with `fleet_etcd` imports this module.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal

import trio

from actors import Child, Ref
from volant import __version__
from volant.fleet import (
    IDS_OF_ONE,
    Definitions,
    Etcd,
    Fleet,
    FleetSettings,
    KeyValues,
    Mirror,
    Namespace,
    make_etcd,
)
from volant.host import Freezer, FreezerFailed, Host, Scopes
from volant.http import AsgiApp, Tls, serve
from volant.journal import Journal, Store
from volant.model import Caller, HostFacts, record_of_vm
from volant.routing import FromHosts
from volant.secrets import KeyFile, SecretFailed
from volant.transfer import Transfers
from volant.vm import Vms, instance_of

from ._arrivals import Arrivals
from ._evacuation import Evacuation
from ._failover import Failover
from ._fleet_plan import fleet_of
from ._replication import Replication
from ._sending import Sending
from ._sent_snapshots import SentSnapshots
from ._settings import Settings, SettingsError

_logger = logging.getLogger("volant.daemon")
_DIRECTORY = "movable"


def freezer_of(host: Host, settings: Settings, scopes: Scopes | None) -> Freezer:
    """Returns the freezer. `scopes` are systemd's; None if systemd does not run the daemon."""
    directory = settings.runtime_dir / _DIRECTORY
    return Freezer(host, directory, instance=instance_of(settings.state_dir), scopes=scopes)


async def end_former_fleet(host: Host, settings: Settings, scopes: Scopes | None, store: Store) -> None:
    """Removes the group that held back movable VMs while this host was in a fleet, unless it is still a member."""
    if not host.files.exists(settings.runtime_dir / _DIRECTORY) or any(row.movable for row in store.projection.rows()):
        return
    try:
        await freezer_of(host, settings, scopes).close()
    except FreezerFailed as error:
        _logger.warning("%s", error)


_CLOSE_S = 2.0
_ID_FILE = "host-id"


class FleetMember:
    """This host as a member of a fleet. :raises SettingsError: a setting is invalid."""

    def __init__(
        self,
        settings: Settings,
        host: Host,
        store: Store,
        sockets: Sequence[socket.socket],
        etcd: KeyValues | None,
        *,
        journal: Ref[Journal],
        key_file: KeyFile,
        clear: Callable[[str], Awaitable[None]],
        accelerator: Callable[[], Literal["kvm", "tcg"] | None],
        vms: Callable[[], Vms],
        transfers: Callable[[], Transfers],
        freezer: Freezer,
    ) -> None:
        """Creates it. `sockets` are for the other hosts; `etcd` replaces that of the settings; `key_file` is for
        secrets; `clear` removes the data of a deleted project; `vms` returns those of this host; `freezer` holds back
        movable ones."""
        plan = fleet_of(settings)
        self._sockets = sockets
        self._tls = Tls(plan.server, lambda: True)
        self._etcd = etcd or make_etcd(plan.etcd)
        address = plan.address
        if address.endswith(":0") and sockets:
            # Only the socket knows the port.
            address = f"{address[:-1]}{sockets[0].getsockname()[1]}"

        def facts() -> HostFacts:
            return HostFacts(
                address=address,
                version=__version__,
                architecture=platform.machine(),
                accelerator=accelerator(),
                cpu_cores=len(os.sched_getaffinity(0)),
                memory_mb=host.machine.memory_total_mb(),
                zone=plan.zone,
                labels=plan.labels,
            )

        async def take_number(number: int) -> None:
            store.ids_taken = max(store.ids_taken, number * IDS_OF_ONE)
            await trio.lowlevel.checkpoint()

        host_id = _host_id(settings, host.random.new_id())

        async def secret_keys() -> list[str]:
            try:
                return [key.id for key in await key_file.read()]
            except SecretFailed:
                return []

        def definitions(etcd: KeyValues, mirror: Mirror) -> Definitions:
            return Definitions(
                etcd,
                mirror,
                plan.host,
                host_id,
                journal=journal,
                store=store,
                secret_keys=secret_keys,
                secret_keys_file=str(key_file.path),
                clear=clear,
                new_id=host.random.new_id,
            )

        self._arrivals = Arrivals(store, fleet=lambda: self.fleet, vms=vms, transfers=transfers)
        self._sending = Sending(plan.host, fleet=lambda: self.fleet, vms=vms, transfers=transfers)
        self._evacuation = Evacuation(
            host,
            store,
            self._sending,
            plan.host,
            ttl_s=plan.ttl_s,
            fleet=lambda: self.fleet,
            vms=vms,
            transfers=transfers,
        )
        self.failover = Failover(
            host,
            store,
            freezer,
            plan.host,
            journal,
            self._arrivals,
            ttl_s=plan.ttl_s,
            vms=vms,
            fleet=lambda: self.fleet,
        )
        self._replication = Replication(
            host,
            store,
            self._sending,
            self.failover,
            plan.host,
            fleet=lambda: self.fleet,
            vms=vms,
            transfers=transfers,
        )
        self._sent_snapshots = SentSnapshots(
            store,
            self._arrivals,
            plan.host,
            is_sent=self._replication.is_sent,
            fleet=lambda: self.fleet,
            vms=vms,
        )
        self.fleet = Fleet(
            Namespace(self._etcd, plan.prefix),
            FleetSettings(host=plan.host, id=host_id, ttl_s=plan.ttl_s),
            facts=facts,
            load=lambda: vms().load(),
            there={
                "vms": store.projection.keys,
                "snapshots": lambda: [key for key, one in store.projection.snapshots.items() if not one.is_replica],
                "volumes": lambda: store.projection.volumes.keys(),
            },
            rows=lambda: ((row.key, record_of_vm(row, plan.host)) for row in store.projection.rows()),
            take_number=take_number,
            new_id=host.random.new_id,
            now=host.clock.now,
            boottime=host.clock.boottime,
            context=plan.client,
            definitions=definitions,
            vms=self.failover,
            lasts=self.failover.lasts,
            until=lambda: self.failover.until,
            leaving=self._evacuation.leaving,
            moves=self._evacuation.moves,
        )
        store.used_elsewhere = self.fleet.used_elsewhere

    def children(
        self, app: AsgiApp, redeem: Callable[[bytes, str], Caller | None], stopping: trio.Event
    ) -> list[Child[Any]]:
        """Returns the children that run while this host is in its fleet.

        :param app: the app for the other hosts; `redeem` uses up tickets; `stopping` ends their streams
        """
        return [
            # Before the fleet, which needs it at once.
            Child("failover", self.failover.keep, shutdown_s=10),
            Child("fleet", self.fleet.keep),
            Child("moves", self._keep_moves, shutdown_s=10),
            Child("hosts", partial(self._serve, app, redeem, stopping), shutdown_s=10),
        ]

    async def _keep_moves(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Moves and replicates VMs from and to this host, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._arrivals.keep)
            await nursery.start(self._evacuation.keep)
            nursery.start_soon(self._replication.keep)
            nursery.start_soon(self._sent_snapshots.keep)
            task_status.started()

    async def _serve(
        self,
        app: AsgiApp,
        redeem: Callable[[bytes, str], Caller | None],
        stopping: trio.Event,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves the other hosts, which must present a certificate, until cancelled."""
        from_hosts = FromHosts(app, redeem, {**self._arrivals.handlers, **self._sending.handlers})
        await serve(from_hosts, self._sockets, stopping=stopping, tls=self._tls, task_status=task_status)
        # The supervisor restarts a child that ends.
        await trio.sleep_forever()

    async def aclose(self) -> None:
        """Closes the connections to etcd."""
        if isinstance(self._etcd, Etcd):
            with trio.move_on_after(_CLOSE_S, shield=True):
                await self._etcd.aclose()


def _host_id(settings: Settings, new_id: str) -> str:
    """Returns the id of this host in its fleet, which is stored in the state directory; `new_id` the first time.

    :raises SettingsError: the file can't be read or written.
    """
    found = known_id(settings)
    if found is not None:
        return found
    path = settings.state_dir / _ID_FILE
    part = path.with_name(f"{_ID_FILE}.{new_id}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(f"{new_id}\n")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        raise SettingsError(f"{path} can't be written: {error.strerror}") from None
    return new_id


def known_id(settings: Settings) -> str | None:
    """Returns the id of this host in a fleet; None if it was never in one. :raises SettingsError:"""
    path = settings.state_dir / _ID_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = file.read(100).decode("latin-1").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}") from None
    if not re.fullmatch(r"[0-9a-f-]{8,64}", found):
        raise SettingsError(f"{path} is damaged; remove it if this host is in no fleet any more")
    return found
