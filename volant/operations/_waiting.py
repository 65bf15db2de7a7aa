"""Waiting for what an operation has begun."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import trio

from volant.http import interruptible
from volant.journal import VmChanged, VmCreated, VmForked

from ._context import Context

Waited = Literal["met", "failed", "timeout"]
"""`met`: all VMs are, or since the call began were, in one of the states. `failed`: one came to rest in another one, or
is gone."""


async def wait_for(context: Context, result: Any, states: Collection[str], timeout_s: float) -> tuple[Any, Waited]:
    """Waits for the VMs of a result; returns them as they are then, and how the wait ended.

    A daemon that stops ends the wait, as if the time were up: the client can wait on when it is back.

    :raises Problem: 401 the caller's credentials ended
    """
    vms, store = context.deps.vms, context.deps.store
    ids = [vm.id for vm in result.copies] if isinstance(result, VmForked) else [result.vm.id]
    outcomes: list[Waited] = []

    async def wait(vm_id: int) -> None:
        outcomes.append((await vms.wait(vm_id, states, timeout_s, since=context.since))[0])

    async def wait_for_all() -> None:
        async with trio.open_nursery() as nursery:
            for vm_id in ids:
                nursery.start_soon(wait, vm_id)

    async with interruptible(context.stopping) as waits:
        await waits.until(wait_for_all)
    if context.stopping.reason is not None:
        raise context.stopping.problem()
    rows = [row for row in map(store.projection.by_id, ids) if row is not None]
    if isinstance(result, VmForked):
        result = VmForked.of(rows)
    elif rows:
        assert isinstance(result, (VmCreated, VmChanged))
        result = result.of(rows[0])
    if "failed" in outcomes:
        return result, "failed"
    return result, "timeout" if "timeout" in outcomes or len(outcomes) < len(ids) else "met"
