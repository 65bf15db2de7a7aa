"""What a VM's actor has to do with networks: its tap before there is a process, whom its guest knows by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from actors import ActorDown, AskTimeout
from volant.hypervisor import HypervisorError, Nic
from volant.journal import Projection
from volant.model import BRIDGE, USER, Lease, VmRow, is_named, kind_of
from volant.network import NetworkFailed, Passt, passt_socket
from volant.network.messages import Attach, Confine, Detach

from ._errors import StepError

if TYPE_CHECKING:
    from ._doors import VmDoors, VmSettings
    from ._process import LiveProcess

HOSTS_AT_ONCE = 8
"""So many guests at a time are told who is in their network."""
_ASK_S = 25.0
_KEEP_S, _KEEP_MAX_S = 1.0, 60.0

_logger = logging.getLogger("volant.vm")


async def attach(doors: VmDoors, row: VmRow) -> None:
    """Have there what is to be behind a VM's NIC. Its row has the tag of the process to come.

    :raises StepError: it can't be had, with the network's own code; `network_down`, `network_refused`.
    """
    if is_user(row) and (refused := doors.store.networking.user_refused):
        raise StepError("network_refused", f"the VM's network: {refused}")
    await _attach(doors, row)


async def _attach(doors: VmDoors, row: VmRow) -> None:
    try:
        if is_user(row):
            await _start_passt(doors, row)
        else:
            await _ask(doors, row, Attach(row.id))
    except NetworkFailed as error:
        raise StepError(error.code, f"the VM's network: {error}") from error


async def attach_anew(doors: VmDoors, row: VmRow) -> None:
    """Attaches a VM again after a hypervisor that may have had its connection was ended: passt ends with that.

    :raises StepError: as `attach`.
    """
    if is_user(row):
        await detach(doors, row)
        await attach(doors, row)


async def note_connected(doors: VmDoors, row: VmRow) -> None:
    """Notes that the launch of a VM has connected its hypervisor to what `attach` started.

    :raises StepError: it can't be noted.
    """
    try:
        if is_user(row):
            await passt_of(doors).note_connected(row.id)
    except NetworkFailed as error:
        raise StepError(error.code, f"the VM's network: {error}") from error


async def detach(doors: VmDoors, row: VmRow) -> None:
    """Leave nothing of that. :raises StepError: `not_removed`."""
    try:
        if is_user(row):
            await passt_of(doors).end(row.id)
        else:
            await _ask(doors, row, Detach(row.id))
    except (NetworkFailed, StepError) as error:
        raise StepError("not_removed", f"what was behind the VM's NIC is left: {error}") from error


async def reconnect(doors: VmDoors, row: VmRow) -> None:
    """Let a guest that runs and was nobody's have its network again. One that can't be had is told to the log: the VM
    is there without. `keep_user_network` does it for a network of the kind `user`."""
    try:
        if not is_user(row):
            await _attach(doors, row)
    except StepError as error:
        _logger.error("VM %s: %s", row.name, error, extra={"vm": row.name})


async def disconnect(doors: VmDoors, vm_id: int, nic: Nic) -> None:
    """Leave nothing of what was behind the NIC of a guest that was nobody's, and is gone. What can't be removed goes
    when the daemon next begins."""
    try:
        if kind_behind(nic) == USER:
            await passt_of(doors).end(vm_id)
        elif nic.tap is not None and doors.network is not None:
            await doors.network.ask(Detach(vm_id), timeout_s=_ASK_S)
    except (NetworkFailed, ActorDown, AskTimeout) as error:
        _logger.error("what was behind the NIC of VM %d is left: %s", vm_id, error)


async def keep_user_network(doors: VmDoors, row: VmRow, live: LiveProcess) -> None:
    """Keeps a process of passt running for as long as the hypervisor of a VM runs, and the hypervisor connected to it.

    A process that ended is started again, and the daemon passes a new connection to the hypervisor.
    """
    passt, pause_s = passt_of(doors), _KEEP_S
    has_ended = False
    while True:
        try:
            await _start_passt(doors, row)
            if not passt.is_connected(row.id):
                if not await (await live.machine()).connect_network():
                    await passt.lend(row.id, doors.hypervisor.user_of(row.tag, row.id))
                await passt.note_connected(row.id)
            if has_ended:
                _logger.warning("VM %s: passt had ended, and was started again", row.name, extra={"vm": row.name})
            began = trio.current_time()
            await passt.ended(row.id)
            has_ended = True
            if trio.current_time() - began >= _KEEP_MAX_S:
                pause_s = _KEEP_S
        except (NetworkFailed, StepError, HypervisorError) as error:
            _logger.warning("VM %s: %s; trying again in %g s", row.name, error, pause_s, extra={"vm": row.name})
        # It ends with its hypervisor, too, as at every stop. This task is cancelled then, before it says a word.
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, _KEEP_MAX_S)


def is_user(row: VmRow) -> bool:
    """Whether a process of its own speaks for its guest."""
    return row.lease is not None and kind_of(row.network) == USER


def passt_of(doors: VmDoors) -> Passt:
    """Those processes."""
    return Passt(doors.host, doors.settings.runtime_dir, doors.instance, doors.settings.passt_user)


async def _start_passt(doors: VmDoors, row: VmRow) -> None:
    """Have one there, which reaches nothing of the host. :raises NetworkFailed, StepError: see `attach`."""
    if doors.network is not None:
        await _ask_keeper(doors, Confine())
    await passt_of(doors).start(row)


async def _ask(doors: VmDoors, row: VmRow, message: Attach | Detach) -> None:
    if row.lease is not None and row.lease.tap:
        await _ask_keeper(doors, message)


async def _ask_keeper(doors: VmDoors, message: Attach | Detach | Confine) -> None:
    if doors.network is None:
        raise StepError("network_down", "this daemon has nobody who keeps its networks")
    try:
        await doors.network.ask(message, timeout_s=_ASK_S)
    except (ActorDown, AskTimeout) as error:
        raise StepError("network_down", f"who keeps the networks does not answer: {error}") from error


def nic_of(settings: VmSettings, row: VmRow) -> Nic | None:
    """The NIC of a VM's machine."""
    lease = row.lease
    if lease is None:
        return None
    return Nic(
        mac=lease.mac,
        tap=lease.tap or None,
        socket=passt_socket(settings.runtime_dir, row.id) if is_user(row) else None,
        address=f"{lease.address}/{lease.prefix}",
        gateway=lease.gateway,
        nameservers=settings.nameservers,
    )


def kind_behind(nic: Nic) -> str:
    """The network of a VM whose machine has this NIC. Only a command line of an earlier version names the socket of
    passt; on others a NIC that has an address and no tap is known by that."""
    return USER if nic.socket is not None or (nic.tap is None and nic.address) else BRIDGE


def lease_of(nic: Nic) -> Lease | None:
    """The lease of a VM whose machine has this NIC; None: it is silent."""
    if not nic.address:
        return None
    address, _, prefix = nic.address.partition("/")
    return Lease(address=address, prefix=int(prefix), gateway=nic.gateway, mac=nic.mac, tap=nic.tap or "")


class Neighbours:
    """What a guest with a NIC is told of itself and of those it reaches, and when that changes."""

    def __init__(self, projection: Projection, row: VmRow, nameservers: tuple[str, ...]) -> None:
        self._projection = projection
        self._row = row
        self._nameservers = nameservers

    @property
    def can_change(self) -> bool:
        """Whether there are others, of whom it is to hear."""
        return is_named(self._row.network)

    def hosts(self) -> Mapping[str, str]:
        """The addresses of those in its network, itself among them; of nobody where that has no name."""
        return self._projection.members(self._row.network) if self.can_change else {}

    async def changed(self, hosts: Mapping[str, str]) -> None:
        """Wait until they are others than these."""
        await self._projection.members_are_not(self._row.network, hosts)

    def told(self) -> dict[str, object] | None:
        """What a copy is told of its NIC (`GuestNetwork`). None: it has none."""
        lease = self._row.lease
        if lease is None:
            return None
        told: dict[str, object] = {
            "mac": lease.mac,
            "address": lease.address,
            "prefix": lease.prefix,
            "gateway": lease.gateway,
        }
        if self._nameservers:
            told["nameservers"] = list(self._nameservers)
        return told | {"hosts": dict(self.hosts())}
