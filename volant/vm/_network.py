"""Connects VMs' network interfaces on the host: taps through the network's actor, or a passt process per VM."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec

from actors import ActorDown, AskTimeout, Ref
from volant.concurrency import Backoff
from volant.hypervisor import Hypervisor, HypervisorError, Machine, Nic
from volant.journal import Store
from volant.model import BRIDGE, USER, Lease, VmRow, is_restricted
from volant.network import NetworkFailed, NetworkKeeper, Passt
from volant.network.messages import Attach, Confine, Detach, Release

from ._machine_spec import uses_passt
from .messages import StepError

_ASK_S = 25.0
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0

_logger = logging.getLogger("volant.vm")


class VmNetworks(msgspec.Struct):
    """The network connections of one daemon's VMs."""

    store: Store
    hypervisor: Hypervisor
    passt: Passt
    keeper: Ref[NetworkKeeper] | None = None
    """The actor that manages taps and firewall rules; None if no VM gets a tap."""

    async def attach(self, row: VmRow) -> None:
        """Connects a VM before its launch, once its row has the tag of the process to come.

        :raises StepError: with the network's own code; `network_down`, `network_refused`.
        """
        refused = self.store.networking.user_refused
        if uses_passt(row) and refused:
            raise StepError("network_refused", f"the VM's network: {refused}")
        await self._attach(row)

    async def reattach(self, row: VmRow) -> None:
        """Connects a VM again after its former hypervisor was ended, because its passt ends with the hypervisor.
        :raises StepError: as `attach`."""
        if uses_passt(row):
            await self.detach(row)
            await self.attach(row)

    async def note_connected(self, row: VmRow) -> None:
        """Records that the launch has connected the VM's hypervisor to the connection of `attach`. :raises StepError:
        it can't be recorded."""
        try:
            if uses_passt(row):
                await self.passt.note_connected(row.id)
        except NetworkFailed as error:
            raise StepError(error.code, f"the VM's network: {error}") from error

    async def detach(self, row: VmRow) -> None:
        """Removes a VM's tap, or ends its passt. :raises StepError: `not_removed`."""
        try:
            if uses_passt(row):
                await self.passt.end(row.id)
                if is_restricted(row.egress):
                    await self._release(row)
            elif row.lease is not None and row.lease.tap:
                await self._ask(Detach(row.id))
        except (NetworkFailed, StepError) as error:
            raise StepError("not_removed", f"the VM's network connection can't be removed: {error}") from error

    async def _release(self, row: VmRow) -> None:
        """Removes the egress rules of a VM whose passt has ended. A failure is logged: the next change of the rules
        removes them, and until then they give no other process any access."""
        try:
            await self._ask(Release(row.id))
        except (NetworkFailed, StepError) as error:
            _logger.warning("VM %s: its egress rules can't be removed now: %s", row.name, error, extra={"vm": row.name})

    async def reconnect_adopted(self, row: VmRow) -> None:
        """Gives an adopted VM its tap again. After a failure, which is logged, the VM runs without it. If passt carries
        its traffic, `keep_passt` does the same."""
        try:
            if not uses_passt(row):
                await self._attach(row)
        except StepError as error:
            _logger.error("VM %s: %s", row.name, error, extra={"vm": row.name})

    async def disconnect_orphan(self, vm_id: int, nic: Nic) -> None:
        """Removes the connection of a killed orphan. Remains are removed at the daemon's next start."""
        try:
            if kind_behind(nic) == USER:
                await self.passt.end(vm_id)
            elif nic.tap is not None and self.keeper is not None:
                await self.keeper.ask(Detach(vm_id), timeout_s=_ASK_S)
        except (NetworkFailed, ActorDown, AskTimeout) as error:
            _logger.error("the network connection of VM %d can't be removed: %s", vm_id, error)

    async def keep_passt(self, row: VmRow, machine: Callable[[], Awaitable[Machine]]) -> None:
        """Keeps a passt process running, and the hypervisor connected to it, until cancelled.

        A passt that ended is started again, and the daemon passes a new connection to the hypervisor.
        """
        passt, backoff = self.passt, Backoff(_RETRY_S, _RETRY_MAX_S, steady_s=_RETRY_MAX_S)
        has_ended = False
        while True:
            try:
                await self._start_passt(row)
                if not passt.is_connected(row.id):
                    if not await (await machine()).connect_network():
                        await passt.lend(row.id, self.hypervisor.user_of(row.tag, row.id))
                    await passt.note_connected(row.id)
                if has_ended:
                    _logger.warning("VM %s: passt had ended, and was started again", row.name, extra={"vm": row.name})
                await passt.ended(row.id)
                has_ended = True
            except (NetworkFailed, StepError, HypervisorError) as error:
                text = "VM %s: %s; trying again in %g s"
                _logger.warning(text, row.name, error, backoff.next_s, extra={"vm": row.name})
            # Passt ends with its hypervisor, too. This task is cancelled then, before it warns of anything.
            await backoff.pause()

    async def _attach(self, row: VmRow) -> None:
        try:
            if uses_passt(row):
                await self._start_passt(row)
            elif row.lease is not None and row.lease.tap:
                await self._ask(Attach(row.id))
        except NetworkFailed as error:
            raise StepError(error.code, f"the VM's network: {error}") from error

    async def _start_passt(self, row: VmRow) -> None:
        """:raises NetworkFailed: :raises StepError:"""
        if self.keeper is not None:
            # So that it can send nothing to the host itself.
            await self._ask(Confine(row.id))
        await self.passt.start(row)

    async def _ask(self, message: Attach | Detach | Confine | Release) -> None:
        if self.keeper is None:
            raise StepError("network_down", "this daemon manages no taps")
        try:
            await self.keeper.ask(message, timeout_s=_ASK_S)
        except (ActorDown, AskTimeout) as error:
            raise StepError("network_down", f"the actor 'network' does not answer: {error}") from error


def kind_behind(nic: Nic) -> str:
    """Returns the kind of network of a machine with this NIC. Only command lines of earlier versions name passt's
    socket. In later ones, an address without a tap means passt."""
    return USER if nic.socket is not None or (nic.tap is None and nic.address) else BRIDGE


def lease_of(nic: Nic) -> Lease | None:
    """Returns the lease of a VM whose machine has this NIC; None if it has no address."""
    if not nic.address:
        return None
    address, _, prefix = nic.address.partition("/")
    return Lease(address=address, prefix=int(prefix), gateway=nic.gateway, mac=nic.mac, tap=nic.tap or "")
