"""Tools that make, change and look at VMs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Annotated, Literal

import msgspec
import trio

from volant.journal import EventGap
from volant.model import (
    Command,
    CommandRequest,
    CreateVm,
    EventId,
    Labels,
    Name,
    Problem,
    Status,
    VmRow,
    VmView,
    check_create,
    view,
)
from volant.operations import chosen, vm_row

from ._text import fitting
from ._tool import DEFAULT_S, Asked, Result, Seconds, log_link


class ListVms(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which VMs."""

    status: list[Status] = []
    """Only VMs in one of these states."""
    plugin: Name | None = None
    """Only VMs of this plugin."""
    labels: Labels = {}
    """Only VMs that have all of these labels."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
    cursor: Annotated[int, msgspec.Meta(ge=0, le=10**18 - 1)] = 0
    """`next_cursor` of the page before."""


class VmPage(msgspec.Struct, frozen=True):
    """Some of the VMs, by id."""

    vms: list[VmView]
    total: int
    """How many fit, on all pages."""
    next_cursor: int | None = None
    """Null on the last page."""


async def list_vms(asked: Asked, wanted: ListVms) -> Result:
    plugins = (wanted.plugin,) if wanted.plugin is not None else ()
    rows = chosen(asked.deps, states=wanted.status, plugins=plugins, labels=wanted.labels)
    left = [row for row in rows if row.id > wanted.cursor]
    page = fitting(view(row) for row in left[: wanted.limit])
    return Result(VmPage(page, len(rows), page[-1].id if page and len(page) < len(left) else None))


class GetVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which VM."""

    vm: Name


async def get_vm(asked: Asked, wanted: GetVm) -> Result:
    return Result(view(vm_row(asked.deps, wanted.vm)), links=(log_link(wanted.vm),))


async def vm_memory(asked: Asked, wanted: GetVm) -> Result:
    return Result(await asked.deps.vms.memory(vm_row(asked.deps, wanted.vm).name))


class MakeVm(CreateVm, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM, and whether to wait for it."""

    wait: bool = True
    """Answer once it runs and commands can be executed in it, or has failed to."""
    timeout_s: Seconds = DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


class ChangedVm(msgspec.Struct, frozen=True):
    """A VM after a change."""

    vm: VmView
    outcome: Literal["done", "failed", "under_way"]
    """`done`: it is in the state that was asked for. `failed`: it came to rest in another one, see `vm.reason`.
    `under_way`: not there yet."""


async def create_vm(asked: Asked, wanted: MakeVm) -> Result:
    asked_for = CreateVm(**{name: getattr(wanted, name) for name in CreateVm.__struct_fields__})
    check_create(asked_for)
    since = asked.deps.store.projection.last_event
    row = await asked.deps.vms.create(asked_for)
    return await changed(asked, row, {Status.RUNNING}, wanted.wait, wanted.timeout_s, since)


class StartVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which VM."""

    vm: Name
    wait: bool = True
    """Answer once it is done, or has failed."""
    timeout_s: Seconds = DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


class StopVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which VM."""

    vm: Name
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 10.0
    """How long the guest has to shut down before it is killed."""
    wait: bool = True
    """Answer once it is done, or has failed."""
    timeout_s: Seconds = DEFAULT_S
    """How long to wait. What is not done then goes on; look again with vms_get."""


async def start_vm(asked: Asked, wanted: StartVm) -> Result:
    return await _apply(asked, wanted, CommandRequest(Command.START), Status.RUNNING)


async def stop_vm(asked: Asked, wanted: StopVm) -> Result:
    return await _apply(asked, wanted, CommandRequest(Command.STOP, grace_s=wanted.grace_s), Status.STOPPED)


async def pause_vm(asked: Asked, wanted: StartVm) -> Result:
    return await _apply(asked, wanted, CommandRequest(Command.PAUSE), Status.PAUSED)


async def resume_vm(asked: Asked, wanted: StartVm) -> Result:
    return await _apply(asked, wanted, CommandRequest(Command.RESUME), Status.RUNNING)


async def restart_vm(asked: Asked, wanted: StopVm) -> Result:
    return await _apply(asked, wanted, CommandRequest(Command.RESTART, grace_s=wanted.grace_s), Status.RUNNING)


async def _apply(asked: Asked, wanted: StartVm | StopVm, request: CommandRequest, state: Status) -> Result:
    name = vm_row(asked.deps, wanted.vm).name
    since = asked.deps.store.projection.last_event
    row = await asked.deps.vms.apply(name, request)
    return await changed(asked, row, {state}, wanted.wait, wanted.timeout_s, since)


async def changed(
    asked: Asked, row: VmRow, states: Collection[str], wait: bool, timeout_s: float, since: EventId
) -> Result:
    """The VM once it is in one of `states`, if somebody waits for that."""
    outcome: Literal["done", "failed", "under_way"] = "done" if row.status in states else "under_way"
    if wait:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell_of, asked, row.id, since)
            wait_for_it = partial(asked.deps.vms.wait, row.id, states, timeout_s, since=since)
            found, now = await asked.until(wait_for_it)
            nursery.cancel_scope.cancel()
        if now is None:
            raise Problem(409, "vm-deleted", f"VM {row.name!r} was deleted meanwhile", vm=row.name)
        row, outcome = now, _OUTCOMES[found]
    return Result(ChangedVm(view(row), outcome), links=(log_link(row.name),), failed=outcome == "failed")


_OUTCOMES: dict[str, Literal["done", "failed", "under_way"]] = {
    "met": "done",
    "failed": "failed",
    "timeout": "under_way",
}


async def _tell_of(asked: Asked, vm_id: int, since: EventId) -> None:
    async with asked.deps.store.events.cursor(since) as cursor:
        while taken := await cursor.take():
            if not isinstance(taken, EventGap):
                for frame in taken:
                    if frame.event.vm_id == vm_id:
                        asked.tell(f"{frame.event.name}: {frame.event.message}")


class DeletedVm(msgspec.Struct, frozen=True):
    """A VM that is gone."""

    name: str
    deleted: Literal[True] = True


async def delete_vm(asked: Asked, wanted: GetVm) -> Result:
    name = vm_row(asked.deps, wanted.vm).name
    await asked.until(partial(asked.deps.vms.delete, name))
    return Result(DeletedVm(name))
