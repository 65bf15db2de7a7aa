"""While the daemon drains and is to stop VMs: all that are up are stopped, some at a time, to start again afterwards.

What is to be done is kept in the journal, and not in a request: whoever asked may leave, and a daemon that restarts
goes on. Stopping one is a restart of which the second half waits (`Hold`), so nothing else has to be remembered about
which VMs ran.
"""

from __future__ import annotations

import logging

import trio

from volant.model import Desired, Problem, Status, VmRow

from ._vms import DELETED, Vms

_logger = logging.getLogger("volant.vm")

AT_ONCE = 8
_AGAIN_S = 1.0
_AGAIN_MAX_S = 30.0
_END_S = 60.0
"""What a stop may take beside its grace before the next VM has its turn."""


async def keep_drained(vms: Vms) -> None:
    """Does it, for as long as it runs, whenever the daemon drains."""
    projection = vms.doors.store.projection
    while True:
        drain = projection.drain
        async with trio.open_nursery() as nursery:
            if drain is not None and drain.stop_grace_s is not None:
                nursery.start_soon(_stop_all, vms, drain.stop_grace_s)
            await projection.drain_is_not(drain)
            nursery.cancel_scope.cancel()


async def _stop_all(vms: Vms, grace_s: float) -> None:
    store = vms.doors.store
    slots = trio.CapacityLimiter(AT_ONCE)
    async with store.events.cursor(store.projection.last_event) as cursor:
        while True:
            rows = store.projection.rows()
            # Those that a daemon before this one has asked count, too.
            stopping = [row.id for row in rows if row.status is Status.STOPPING]
            async with trio.open_nursery() as nursery:
                for vm_id in (*stopping, *(row.id for row in rows if _is_up(row))):
                    await slots.acquire_on_behalf_of(vm_id)
                    nursery.start_soon(_stop, vms, vm_id, grace_s, slots)
            # A boot that had been decided on when the drain began is up a moment later.
            if not await cursor.take():
                return


async def _stop(vms: Vms, vm_id: int, grace_s: float, slots: trio.CapacityLimiter) -> None:
    try:
        pause_s = _AGAIN_S
        while (row := vms.doors.store.projection.by_id(vm_id)) is not None and _is_up(row):
            try:
                await vms.set_aside(row, grace_s)
            except Problem as problem:
                if problem.status != 412:
                    _logger.warning("VM %s is not stopped yet: %s", row.name, problem.detail, extra={"vm": row.name})
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MAX_S)
        await vms.wait(vm_id, {Status.STOPPED, Status.CRASHED, DELETED}, grace_s + _END_S)
    finally:
        slots.release_on_behalf_of(vm_id)


def _is_up(row: VmRow) -> bool:
    return row.status in (Status.STARTING, Status.RUNNING, Status.PAUSED) and row.desired in (
        Desired.RUNNING,
        Desired.PAUSED,
    )
