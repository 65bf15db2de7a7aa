"""Tools that copy VMs: forks, which run at once, and snapshots, which are kept."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
import trio

from volant.model import (
    MAX_COPIES,
    Duration,
    ForkVm,
    Labels,
    Name,
    Plain,
    RestoreVm,
    SnapshotView,
    Status,
    TakeSnapshot,
    VmView,
    check_fork,
    check_restore,
    check_take,
    snapshot_view,
    view,
)
from volant.operations import vm_row

from ._text import fitting
from ._tool import DEFAULT_S, Asked, Result, Seconds, log_link
from ._vms import changed


class Fork(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of which VM, and how many copies."""

    vm: Name
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)] | None = None
    """Null: as many as there are names, or one."""
    names: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_COPIES)] | None = None
    """Of the copies. Null: the VM's name with `-fork-1` and so on."""
    wait: bool = True
    """Answer once all of them run, or have failed to."""
    timeout_s: Seconds = DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


class ForkedVms(msgspec.Struct, frozen=True):
    """Copies of a VM."""

    vms: list[VmView]
    outcome: Literal["done", "failed", "under_way"]
    """`done`: all run. `failed`: one at least has not come to run, see its `reason`. `under_way`: not there yet."""


async def fork_vm(asked: Asked, wanted: Fork) -> Result:
    request = ForkVm(count=wanted.count, names=wanted.names)
    check_fork(request)
    since = asked.deps.store.projection.last_event
    copies = await asked.deps.vms.fork(vm_row(asked.deps, wanted.vm).name, request)
    outcomes: list[str] = []

    async def wait_for(vm_id: int) -> None:
        outcomes.append((await asked.deps.vms.wait(vm_id, {Status.RUNNING}, wanted.timeout_s, since=since))[0])

    async def wait() -> bool:
        async with trio.open_nursery() as nursery:
            for copy in copies:
                nursery.start_soon(wait_for, copy.id)
        return True

    if wanted.wait:
        await asked.until(wait)
    now = [asked.deps.store.projection.by_id(copy.id) or copy for copy in copies]
    failed = "failed" in outcomes
    done = len(outcomes) == len(copies) and set(outcomes) == {"met"}
    outcome: Literal["done", "failed", "under_way"] = "failed" if failed else "done" if done else "under_way"
    return Result(
        ForkedVms([view(row) for row in now], outcome), links=tuple(log_link(row.name) for row in now), failed=failed
    )


class Take(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of which VM."""

    vm: Name
    name: Name | None = None
    """Of the snapshot. Null: it is made of the VM's name and the time."""
    description: Plain = ""
    """What it is good for."""


async def take_snapshot(asked: Asked, wanted: Take) -> Result:
    request = TakeSnapshot(name=wanted.name, description=wanted.description)
    check_take(request)
    name = vm_row(asked.deps, wanted.vm).name
    return Result(snapshot_view(await asked.until(partial(asked.deps.vms.take_snapshot, name, request))))


class Restore(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """From which snapshot, and what the new VM is called."""

    name: Name
    snapshot: Name
    labels: Labels = {}
    ttl: Duration | None = None
    """The VM is deleted after so long, such as `30m`."""
    wait: bool = True
    """Answer once it runs, or has failed to."""
    timeout_s: Seconds = DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


async def restore_vm(asked: Asked, wanted: Restore) -> Result:
    request = RestoreVm(name=wanted.name, from_snapshot=wanted.snapshot, labels=wanted.labels, ttl=wanted.ttl)
    check_restore(request)
    since = asked.deps.store.projection.last_event
    row = await asked.deps.vms.restore(request)
    return await changed(asked, row, {Status.RUNNING}, wanted.wait, wanted.timeout_s, since)


class ListSnapshots(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which snapshots."""

    vm: Name | None = None
    """Only those of VMs of this name, also of one that is gone."""


class SnapshotList(msgspec.Struct, frozen=True):
    """Snapshots, the newest first."""

    snapshots: list[SnapshotView]
    left_out: int
    """How many older ones did not fit."""


async def list_snapshots(asked: Asked, wanted: ListSnapshots) -> Result:
    await trio.lowlevel.checkpoint()
    all_of_them = asked.deps.store.projection.snapshots.values()
    found = [one for one in all_of_them if wanted.vm in (None, one.vm.name)]
    found.sort(key=lambda one: one.created_at, reverse=True)
    shown = fitting(snapshot_view(one) for one in found)
    return Result(SnapshotList(shown, len(found) - len(shown)))


class WhichSnapshot(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which snapshot."""

    snapshot: Name


class DeletedSnapshot(msgspec.Struct, frozen=True):
    """A snapshot that is gone."""

    snapshot: str
    deleted: Literal[True] = True


async def delete_snapshot(asked: Asked, wanted: WhichSnapshot) -> Result:
    await asked.deps.vms.remove_snapshot(wanted.snapshot)
    return Result(DeletedSnapshot(wanted.snapshot))
