"""Stops running VMs while the daemon drains, some at a time; they start again afterwards.

The drain is stored in the journal and not in a request: the caller may disconnect, and a restarted daemon continues it.
A stop is a restart whose second half waits (`Hold`), so the row itself records that the VM ran.
"""

from __future__ import annotations

import logging

import trio

from volant.concurrency import Backoff
from volant.journal import Store
from volant.model import Desired, Problem, Status, VmRow

from ._lifecycle import DELETED, Lifecycle

AT_ONCE = 8
_RETRY_S, _RETRY_MAX_S = 1.0, 30.0
_END_S = 60.0
"""Time for a stop, besides its grace, before the next VM is stopped."""
_logger = logging.getLogger("volant.vm")


async def keep_drained(vms: Lifecycle, store: Store) -> None:
    """Stops VMs whenever the daemon drains and should stop them, until cancelled."""
    projection = store.projection
    while True:
        drain = projection.drain
        async with trio.open_nursery() as nursery:
            if drain is not None and drain.stop_grace_s is not None:
                nursery.start_soon(_stop_all, vms, store, drain.stop_grace_s)
            await projection.drain_is_not(drain)
            nursery.cancel_scope.cancel()


async def _stop_all(vms: Lifecycle, store: Store, grace_s: float) -> None:
    slots = trio.CapacityLimiter(AT_ONCE)
    async with store.events.cursor(store.projection.last_event) as cursor:
        while True:
            rows = store.projection.rows()
            # VMs that an earlier daemon asked to stop count, too.
            stopping = [row.id for row in rows if row.status is Status.STOPPING]
            async with trio.open_nursery() as nursery:
                for vm_id in (*stopping, *(row.id for row in rows if _is_up(row))):
                    await slots.acquire_on_behalf_of(vm_id)
                    nursery.start_soon(_stop, vms, store, vm_id, grace_s, slots)
            # A boot that was decided on when the drain began is up a moment later.
            if not await cursor.take():
                return


async def _stop(vms: Lifecycle, store: Store, vm_id: int, grace_s: float, slots: trio.CapacityLimiter) -> None:
    try:
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while (row := store.projection.by_id(vm_id)) is not None and _is_up(row):
            try:
                await vms.stop_for_drain(row, grace_s)
            except Problem as problem:
                if problem.status != 412:
                    _logger.warning("VM %s is not stopped yet: %s", row.name, problem.detail, extra={"vm": row.name})
                await backoff.pause()
        await vms.wait(vm_id, {Status.STOPPED, Status.CRASHED, DELETED}, grace_s + _END_S)
    finally:
        slots.release_on_behalf_of(vm_id)


def _is_up(row: VmRow) -> bool:
    return row.status in (Status.STARTING, Status.RUNNING, Status.PAUSED) and row.desired in (
        Desired.RUNNING,
        Desired.PAUSED,
    )
