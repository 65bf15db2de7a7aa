"""The actor `network`: one at a time, and all who wait at once.

Whoever asks while the host is being seen to waits for the next turn, together with all others who came meanwhile: so a
hundred VMs that are created at once change the firewall a few times, and not a hundred.

What goes wrong at its start keeps nobody from starting, as VMs without a network don't need it. It is told, and tried
again by the next VM that does, or after a while. So is the tap of a VM that runs and nobody asks for any more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import trio

from actors import Actor, Deferred, TaskHandle, handles

from ._backend import NetworkFailed
from ._networks import Networks
from .messages import Attach, Confine, Detach, Reconcile

_Waiting = tuple[int | None, Deferred[None]]
"""Who asked for a VM, or, with None, for all of it."""
_TURN_S = 120.0
_AGAIN_S = 30.0
_AT_ONCE = 100
"""Who waits longer than all of these take would rather be among the next."""
_logger = logging.getLogger("volant.network")


class NetworkKeeper(Actor):
    """See `volant.network.messages` for what it takes."""

    mailbox = 256

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._waiting: list[_Waiting] = []
        self._wake = trio.Event()
        self._due = True
        """Whether all of it is to be looked at."""
        self._tasks: list[TaskHandle] = []
        self._watched = False
        self._failure: NetworkFailed | None = None
        self._passt_failure: NetworkFailed | None = None
        self._turns = 0
        self._asked = 0

    async def on_start(self) -> None:
        # Nobody has watched since the last one of us ended.
        self._networks.passts.forget()
        self._tasks.append(self.ctx.spawn(self._work, name="networks"))

    async def on_stop(self) -> None:
        for task in self._tasks:
            task.cancel()
            await task.wait()
        # Another daemon may want the subnet, and the next one of ours makes all of it anew.
        for remove in (self._networks.remove_unused, self._networks.passts.remove_unused):
            try:
                await remove()
            except NetworkFailed as error:
                _logger.error("not all of the network is removed: %s", error)

    def inspect(self) -> Mapping[str, object]:
        return {
            **self._networks.statistics(),
            "waiting": len(self._waiting),
            "asked": self._asked,
            "turns": self._turns,
            "failure": str(self._failure) if self._failure is not None else None,
        }

    @handles(Attach)
    async def attach(self, message: Attach) -> Deferred[None]:
        return self._enqueue(message.vm_id, self.ctx.defer(message))

    @handles(Detach)
    async def detach(self, message: Detach) -> Deferred[None]:
        return self._enqueue(message.vm_id, self.ctx.defer(message))

    @handles(Confine)
    async def confine(self, message: Confine) -> None:
        passts = self._networks.passts
        if passts.is_possible:
            self._watch()
            await passts.ensure()

    @handles(Reconcile)
    async def reconcile(self, message: Reconcile) -> Deferred[None]:
        return self._enqueue(None, self.ctx.defer(message))

    def _enqueue(self, vm_id: int | None, deferred: Deferred[None]) -> Deferred[None]:
        self._waiting.append((vm_id, deferred))
        self._asked += 1
        self._wake.set()
        return deferred

    def _tear(self, why: str) -> None:
        """Somebody has taken away what keeps guests apart, or connected: it is put back at once."""
        _logger.warning("the network is put back, as %s", why)
        self._networks.passts.forget()
        self._due = True
        self._wake.set()

    def _watch(self) -> None:
        """Hear of what is taken away, from now on."""
        if not self._watched:
            self._watched = True
            self._tasks.append(self.ctx.spawn(self._networks.watch, self._tear, name="watch"))

    async def _work(self) -> None:
        while True:
            if self._due:
                self._due = False
                await self._look_at_all()
            while self._waiting:
                waiting, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
                await self._turn(waiting)
            # VMs may run that nothing keeps apart, or connects.
            well = self._failure is None and self._passt_failure is None and not self._networks.lacking
            with trio.move_on_after(math.inf if well else _AGAIN_S) as pause:
                await self._wake.wait()
            self._due |= pause.cancelled_caught
            self._wake = trio.Event()

    async def _look_at_all(self) -> None:
        before = str(self._passt_failure)
        passts = self._networks.passts
        try:
            if passts.is_possible and not passts.stands and await passts.is_needed():
                self._watch()
                await passts.ensure()
            self._passt_failure = None
        except NetworkFailed as error:
            self._passt_failure = error
            if str(error) != before:
                _logger.error("VMs with the network 'user' reach this host itself: %s", error)
        before = str(self._failure)
        await self._turn(())
        if self._failure is not None and str(self._failure) != before:
            _logger.error("VMs on the bridge are without a network: %s", self._failure)

    async def _turn(self, waiting: Sequence[_Waiting]) -> None:
        """See to what was asked for, or to all of it when nothing was, and answer."""
        self._turns += 1
        vm_ids = {vm_id for vm_id, _ in waiting if vm_id is not None}
        lacked = self._networks.lacking
        failures: Mapping[int, NetworkFailed] = {}
        failure: NetworkFailed | None = None
        try:
            with trio.fail_after(_TURN_S):
                if not vm_ids or any(vm_id is None for vm_id, _ in waiting):
                    failures = await self._networks.reconcile()
                if vm_ids:
                    failures = await self._networks.ensure(vm_ids)
        except NetworkFailed as error:
            failure = error
        except trio.TooSlowError:
            failure = NetworkFailed("timeout", f"the host's networks were not ready within {_TURN_S:g} s")
        self._failure = failure
        # Who has asked is answered.
        for lacks in self._networks.lacking.keys() - lacked.keys() - vm_ids:
            _logger.error("VM %d is without a network: %s", lacks, self._networks.lacking[lacks])
        if self._networks.stands:
            self._watch()
        for vm_id, deferred in waiting:
            failed = failure or (failures.get(vm_id) if vm_id is not None else next(iter(failures.values()), None))
            if failed is None:
                deferred.reply(None)
            else:
                deferred.fail(NetworkFailed(failed.code, str(failed)))
