"""The actor `network` serves requests in batches.

Requests that arrive while a batch is being served form the next batch. So a hundred VMs that start at the same time
change the firewall a few times instead of a hundred times.

A failure at the start does not stop the daemon, as VMs without a network don't need this actor. It is logged and
retried with the next batch or after 30 s. So is a running VM's tap that could not be repaired.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import trio

from actors import Actor, Deferred, TaskHandle, handles

from ._backend import NetworkFailed
from ._networks import Networks
from .messages import Attach, Confine, Detach, Reconcile, Release

_Waiting = tuple[int | None, Deferred[None]]
"""A request's VM, or None for all of them, and where to answer it."""
_BATCH_S = 120.0
_BATCH_SIZE = 100
"""A larger batch would delay the answers of all its requests."""
_RETRY_S = 30.0
_logger = logging.getLogger("volant.network")


class NetworkKeeper(Actor):
    """Sets up and repairs the host's networks; see `volant.network.messages`."""

    mailbox = 256

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._waiting: list[_Waiting] = []
        self._wake = trio.Event()
        self._reconcile_due = True
        self._tasks: list[TaskHandle] = []
        self._watched = False
        self._failure: NetworkFailed | None = None
        self._passt_failure: NetworkFailed | None = None
        self._batches = 0
        self._asked = 0

    async def on_start(self) -> None:
        # Losses were not noticed since the previous incarnation ended.
        self._networks.forget()
        self._tasks.append(self.ctx.spawn(self._work, name="networks"))

    async def on_stop(self) -> None:
        for task in self._tasks:
            task.cancel()
            await task.wait()
        # Another daemon may need the subnet; this daemon's next run creates everything again.
        networks = self._networks
        for remove in (networks.remove_unused, networks.passt_filter.remove_unused, networks.remove_unused_egress):
            try:
                await remove()
            except NetworkFailed as error:
                _logger.error("the network could not be removed completely: %s", error)

    def inspect(self) -> Mapping[str, object]:
        return {
            **self._networks.statistics(),
            "waiting": len(self._waiting),
            "asked": self._asked,
            "batches": self._batches,
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
        if self._networks.passt_filter.is_possible:
            self._watch()
        await self._networks.confine(message.vm_id)

    @handles(Release)
    async def release(self, message: Release) -> None:
        await self._networks.release(message.vm_id)

    @handles(Reconcile)
    async def reconcile(self, message: Reconcile) -> Deferred[None]:
        return self._enqueue(None, self.ctx.defer(message))

    def _enqueue(self, vm_id: int | None, deferred: Deferred[None]) -> Deferred[None]:
        self._waiting.append((vm_id, deferred))
        self._asked += 1
        self._wake.set()
        return deferred

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._tasks.append(self.ctx.spawn(self._networks.watch, self._on_loss, name="watch"))

    def _on_loss(self, what: str) -> None:
        _logger.warning("repairing the network: %s", what)
        self._networks.forget()
        self._reconcile_due = True
        self._wake.set()

    async def _work(self) -> None:
        while True:
            if self._reconcile_due:
                self._reconcile_due = False
                await self._reconcile_all()
            while self._waiting:
                batch, self._waiting = self._waiting[:_BATCH_SIZE], self._waiting[_BATCH_SIZE:]
                await self._serve(batch)
            # After a failure VMs may run that nothing isolates or connects.
            well = self._failure is None and self._passt_failure is None and not self._networks.without_tap
            with trio.move_on_after(math.inf if well else _RETRY_S) as pause:
                await self._wake.wait()
            self._reconcile_due |= pause.cancelled_caught
            self._wake = trio.Event()

    async def _reconcile_all(self) -> None:
        before = str(self._passt_failure)
        passt_filter = self._networks.passt_filter
        try:
            unresolved: Mapping[int, NetworkFailed] = {}
            if passt_filter.is_possible and await passt_filter.is_needed():
                self._watch()
                # Each does nothing if its table is loaded. One may have failed when the other was.
                await passt_filter.ensure()
                unresolved = await self._networks.egress.ensure()
            self._passt_failure = next(iter(unresolved.values()), None)
        except NetworkFailed as error:
            self._passt_failure = error
            if str(error) != before:
                _logger.error("destinations of VMs with the network 'user' are not filtered: %s", error)
        before = str(self._failure)
        await self._serve(())
        if self._failure is not None and str(self._failure) != before:
            _logger.error("VMs on the bridge are without a network: %s", self._failure)

    async def _serve(self, batch: Sequence[_Waiting]) -> None:
        """Serves and answers a batch; an empty one reconciles everything."""
        self._batches += 1
        vm_ids = {vm_id for vm_id, _ in batch if vm_id is not None}
        known = self._networks.without_tap.keys()
        failures: Mapping[int, NetworkFailed] = {}
        failure: NetworkFailed | None = None
        try:
            with trio.fail_after(_BATCH_S):
                if not vm_ids or any(vm_id is None for vm_id, _ in batch):
                    failures = await self._networks.reconcile()
                if vm_ids:
                    failures = await self._networks.ensure(vm_ids)
        except NetworkFailed as error:
            failure = error
        except trio.TooSlowError:
            failure = NetworkFailed("timeout", f"the host's networks were not ready within {_BATCH_S:g} s")
        self._failure = failure
        # The VMs of this batch get an answer instead of a log line.
        for missing in self._networks.without_tap.keys() - known - vm_ids:
            _logger.error("VM %d is without a network: %s", missing, self._networks.without_tap[missing])
        if self._networks.is_complete:
            self._watch()
        for vm_id, deferred in batch:
            failed = failure or (failures.get(vm_id) if vm_id is not None else next(iter(failures.values()), None))
            if failed is None:
                deferred.reply(None)
            else:
                deferred.fail(NetworkFailed(failed.code, str(failed)))
