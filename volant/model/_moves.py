"""Moves of VMs from one host of a fleet to another, with memory and disk (docs/explanation/fleet.md)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec

from ._effects import is_at_rest
from ._problem import Problem
from ._row import Leaving, Move, Phase, Status, VmRow
from ._snapshot import Snapshot, has_disk_to_move, is_copyable
from ._text import Time

MoveState = Literal["waiting", "preparing", "copying", "deciding", "ending", "stays"]
"""`waiting`: for a slot, or until the VM runs or is at rest; `preparing`: the VM is being paused and saved; `copying`:
the other host receives the data that it lacks; `deciding`: etcd is asked; `ending`: the other host has the VM, and it
is removed here; `stays`: the VM can't move, or the move failed and is retried later."""


class MoveView(msgspec.Struct, frozen=True, kw_only=True):
    """A VM of a host that is being drained."""

    vm: str
    project: str
    state: MoveState
    to_host: str | None
    """The host that it moves to; null if that is not decided."""
    reason: str | None
    """Why it waits or stays, or why the last try failed."""
    done_bytes: int = 0
    """The bytes of memory, devices and disk that the other host has, before compression."""
    total_bytes: int = 0
    """The bytes of memory, devices and disk together; 0 if not known yet."""
    moved_bytes: int = 0
    """The bytes that were sent. The other host already had the rest, or it is zeros."""


class HostMoves(msgspec.Struct, frozen=True, kw_only=True):
    """The moves of a host's VMs to other hosts."""

    host: str
    since: Time | None
    """The time since which the host moves its VMs to other hosts; null if it does not."""
    moves: Sequence[MoveView]
    """Its VMs while it does so, and the VMs whose moves are being ended."""


def obstacle_to_move(row: VmRow) -> str | None:
    """Returns why a VM can't move to another host in its present state; None if it can, or if its state is about to
    change."""
    if row.directories:
        return f"it mounts the directory {row.directories[0].source} of its host"
    if row.volumes:
        return f"it mounts the volume {row.volumes[0].name!r}, which is on its host alone"
    if row.checkpoint is not None and is_at_rest(row):
        return f"it is {row.status.value}, and continues from a snapshot that is only here: start it, or delete it"
    return None


def can_move_now(row: VmRow) -> bool:
    """Returns whether a VM without an obstacle runs, is paused or is at rest, and is not about to change its state."""
    return is_copyable(row) or is_at_rest(row)


def check_leaves(row: VmRow) -> None:
    """Checks that a VM can move to another host now. :raises Problem: 409."""
    obstacle = obstacle_to_move(row)
    if obstacle is None and not can_move_now(row):
        obstacle = f"it is {row.status.value}, to be {row.desired.value}"
    if obstacle is not None:
        raise Problem(409, "vm-stays", f"VM {row.name!r} can't move now: {obstacle}", vm=row.name)


def moving(row: VmRow, leaving: Leaving) -> Problem:
    """Returns the 503 for a request about a VM that moves to another host."""
    return Problem(
        503, "vm-moving", f"VM {row.name!r} is moving from {leaving.from_host} to {leaving.to_host}", vm=row.name,
        hint="try again: it continues there, or here if that fails", retry_after_s=2,
    )  # fmt: skip


def arrived_row(snapshot: Snapshot, *, vm_id: int, epoch: int, now: datetime) -> VmRow:
    """Returns the row of a VM that continues on this host: with the status `pending`, or at rest as before.

    :param snapshot: the snapshot that its former host took, for the move or as a replica
    :param epoch: the number of hosts that it has had
    """
    vm = snapshot.vm
    leaving = vm.leaving
    assert leaving is not None
    movable = vm.movable
    move = Move(leaving.from_host, leaving.to_host, leaving.at, "moved")
    if leaving.replica:
        move = Move(leaving.from_host, leaving.to_host, now, "restored")
    row = msgspec.structs.replace(
        vm,
        id=vm_id,
        # Its agent is asked for the same workload as before.
        attach=vm.waits_for_client,
        movable=None if movable is None else msgspec.structs.replace(movable, epoch=epoch, move=None),
        leaving=None,
        move=move,
        replica=None,
        arrived=leaving.id,
        updated_at=now,
        layer=f"{vm_id}-{now:%Y%m%dT%H%M%S.%f}" if vm.layer else "",
        lease=None,
        desired=leaving.desired,
        generation=1,
        status=Status.PENDING,
        phase=Phase.NONE,
        reason=None,
        booted=0,
        boots=0,
        started_at=None,
        template=None,
        fallback=None,
        checkpoint=snapshot.checkpoint,
        disk_from=None,
        tag="",
        process=None,
        serial_socket=None,
        hypervisor=None,
        accelerator=None,
        agent_seen=False,
        workload=None,
        found_boot=0,
        revision=0,
    )
    if not is_at_rest(vm):
        return row
    return msgspec.structs.replace(
        row,
        generation=vm.generation,
        booted=vm.booted,
        status=vm.status,
        reason=vm.reason,
        workload=vm.workload,
        checkpoint=None,
        disk_from=snapshot.checkpoint if has_disk_to_move(vm) else None,
    )
