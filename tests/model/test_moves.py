"""A VM that goes on at another host: paused and held until it is decided, and what it keeps where it arrives."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import msgspec
import pytest

from tests.model.kit import LEAVING, NOW, PROCESS, WHY, outcome, see, settle
from tests.model.test_decide import running
from volant.model import (
    AskStop,
    Command,
    CommandRequest,
    CreateVm,
    Desired,
    Ended,
    EndKind,
    Hold,
    Kill,
    Leaves,
    Left,
    Movable,
    Move,
    Origin,
    Pause,
    Paused,
    Phase,
    PrepareImage,
    Problem,
    Replica,
    Resume,
    Seen,
    Snapshot,
    Status,
    Stays,
    StepFailed,
    VmRow,
    Woke,
    arrived_row,
    decide,
    effect_of,
    is_at_rest,
    obstacle_to_move,
    waits_for,
)

STAYS = Stays("m1", "the other host is full")


def leaving() -> VmRow:
    row = see(running(), Leaves(LEAVING))
    assert isinstance(effect_of(row), Pause)
    return see(row, Paused())


def test_a_vm_that_leaves_is_paused_and_takes_no_commands() -> None:
    row = leaving()
    assert (row.status, row.desired, effect_of(row)) == (Status.PAUSED, Desired.PAUSED, None)
    assert row.view.move == Move("h1", "h2", NOW, "moving")
    for command in (Command.RESUME, Command.STOP, Command.DELETE, Command.RESTART):
        with pytest.raises(Problem) as refused:
            decide(row, CommandRequest(command), NOW)
        assert (refused.value.status, refused.value.code) == (503, "vm-moving")
    # It is noted that etcd is asked, and another move is refused.
    assert see(row, Leaves(msgspec.structs.replace(LEAVING, deciding=True))).leaving != LEAVING
    with pytest.raises(Problem):
        decide(row, Leaves(msgspec.structs.replace(LEAVING, id="m2")), NOW)


def test_a_vm_that_stays_goes_on_as_it_was() -> None:
    row = see(leaving(), Stays("m2", "of another move"))
    assert row.leaving == LEAVING
    row = see(row, STAYS)
    assert isinstance(effect_of(row), Resume)
    after = settle(row)
    assert after is not None
    assert (after.status, after.desired, after.leaving, after.view.move) == (
        Status.RUNNING,
        Desired.RUNNING,
        None,
        None,
    )
    # Also while it is being paused, or if that fails.
    for halfway in (see(running(), Leaves(LEAVING)), see(running(), Leaves(LEAVING), StepFailed(WHY))):
        after = settle(see(halfway, STAYS))
        assert after is not None
        assert (after.status, after.phase) == (Status.RUNNING, Phase.NONE)
    paused = settle(see(running(), CommandRequest(Command.PAUSE)))
    assert paused is not None
    row = see(paused, Leaves(msgspec.structs.replace(LEAVING, desired=Desired.PAUSED)), STAYS)
    assert (row.status, row.desired, effect_of(row)) == (Status.PAUSED, Desired.PAUSED, None)


def test_a_vm_that_leaves_boots_nowhere_until_it_is_decided() -> None:
    """Its host was rebooted, or its hypervisor has ended."""
    row = leaving()
    for end in (Woke(None, rebooted=True), Ended(EndKind.RESET, WHY)):
        after = see(row, end, held=True)
        while isinstance(effect_of(after), Kill):
            after = see(after, *_outcomes(after), held=True)
        assert (after.status, isinstance(effect_of(after), Hold)) == (Status.STOPPED, True)
        row_after = settle(see(after, STAYS))
        assert row_after is not None
        assert row_after.status is Status.RUNNING


def _outcomes(row: VmRow) -> tuple[Seen, ...]:
    effect = effect_of(row)
    assert effect is not None
    return (outcome(effect),)


def test_what_has_gone_on_elsewhere_ends_without_a_word_to_the_guest() -> None:
    row = see(leaving(), Left("h2"))
    assert (row.status, row.process) == (Status.DELETING, PROCESS)
    assert isinstance(effect_of(row), Kill)
    assert not isinstance(effect_of(row), AskStop)
    assert see(row, STAYS).status is Status.DELETING
    assert settle(row) is None


def at_rest(status: Status = Status.STOPPED, more: Mapping[str, object] = {}) -> VmRow:
    """Returns a VM with a disk that is stopped, or has crashed."""
    stopped = settle(see(running(), CommandRequest(Command.STOP)))
    assert stopped is not None
    row = msgspec.structs.replace(stopped, layer="7-disk")
    if status is Status.CRASHED:
        row = msgspec.structs.replace(row, status=status, desired=Desired.RUNNING, reason=WHY)
    return msgspec.structs.replace(row, **more)


@pytest.mark.parametrize("status", [Status.STOPPED, Status.CRASHED])
def test_a_vm_at_rest_that_leaves_takes_no_commands_and_stays_as_it_was(status: Status) -> None:
    before = at_rest(status)
    # What it should be is known when it leaves, not before.
    row = see(before, Leaves(LEAVING))
    assert (row.status, row.desired, effect_of(row)) == (status, before.desired, None)
    assert row.leaving == msgspec.structs.replace(LEAVING, desired=before.desired)
    for command in (Command.START, Command.STOP, Command.DELETE, Command.RESTART):
        with pytest.raises(Problem) as refused:
            decide(row, CommandRequest(command), NOW)
        assert (refused.value.status, refused.value.code) == (503, "vm-moving")
    stays = see(row, STAYS)
    assert (stays.status, stays.desired, stays.leaving, effect_of(stays)) == (status, before.desired, None, None)
    assert see(stays, CommandRequest(Command.START)).status is Status.STARTING


def test_a_vm_that_starts_again_by_itself_is_not_at_rest() -> None:
    row = at_rest(Status.CRASHED, {"restart_policy": "always"})
    assert (is_at_rest(row), obstacle_to_move(row)) == (False, None)
    assert is_at_rest(msgspec.structs.replace(row, restarts=10))
    with pytest.raises(Problem, match="can't move now"):
        decide(row, Leaves(LEAVING), NOW)


def test_a_vm_whose_memory_is_in_a_snapshot_of_this_host_stays() -> None:
    row = at_rest(more={"checkpoint": "snapshot-s1"})
    assert "start it" in (obstacle_to_move(row) or "")
    with pytest.raises(Problem) as refused:
        decide(row, Leaves(LEAVING), NOW)
    assert (refused.value.code, refused.value.status) == ("vm-stays", 409)


@pytest.mark.parametrize("status", [Status.STOPPED, Status.CRASHED])
def test_a_vm_at_rest_arrives_as_it_was_and_boots_from_its_disk(status: Status) -> None:
    sent = see(at_rest(status), Leaves(LEAVING))
    snapshot = Snapshot(id="s1", name="moved-m1", status="ready", vm=sent, created_at=NOW, move="m1")
    row = arrived_row(snapshot, vm_id=20, epoch=2, now=NOW)
    assert (row.id, row.status, row.desired, row.reason) == (20, status, sent.desired, sent.reason)
    assert (row.checkpoint, row.disk_from, effect_of(row)) == (None, "snapshot-s1", None)
    assert see(row, Woke(None, rebooted=True)) == row
    assert waits_for(row, "snapshot-s1")
    # It may leave again before it was started.
    again = msgspec.structs.replace(snapshot, id="s2", vm=see(row, Leaves(LEAVING)))
    assert arrived_row(again, vm_id=21, epoch=3, now=NOW).disk_from == "snapshot-s2"
    booting = see(row, CommandRequest(Command.START))
    assert booting.disk_from == "snapshot-s1"
    booted = see(booting, outcome(PrepareImage("auto")))
    assert (booted.disk_from, waits_for(booted, "snapshot-s1")) == (None, False)


@pytest.mark.parametrize("changes", [{"layer": ""}, {"boots": 0}, {"boots": 1, "fallback": WHY}])
def test_a_vm_at_rest_without_a_disk_of_its_own_needs_no_snapshot(changes: dict[str, object]) -> None:
    sent = see(at_rest(more=changes), Leaves(LEAVING))
    snapshot = Snapshot(id="s1", name="moved-m1", status="ready", vm=sent, created_at=NOW, move="m1")
    row = arrived_row(snapshot, vm_id=20, epoch=2, now=NOW)
    assert (row.checkpoint, row.disk_from) == (None, None)


def test_a_vm_that_arrives_is_what_it_was() -> None:
    wanted = msgspec.convert({"name": "demo", "failover": "restart"}, CreateVm)
    movable = Movable(id="c1", request=wanted, epoch=3, move=Move("h0", "h1", NOW, "taken_over"))
    origin = Origin("fork", "other", 5)
    row = msgspec.structs.replace(
        leaving(), labels={"a": "b"}, env={"X": "y"}, movable=movable, origin=origin, layer="7-old", restarts=2,
        expires_at=NOW + timedelta(hours=1),
    )  # fmt: skip
    snapshot = Snapshot(id="s1", name="moved-m1", status="ready", vm=row, created_at=NOW, move="m1")
    later = NOW + timedelta(minutes=1)
    new = arrived_row(snapshot, vm_id=20, epoch=4, now=later)
    assert (new.id, new.status, new.desired, new.checkpoint) == (20, Status.PENDING, Desired.RUNNING, "snapshot-s1")
    assert (new.process, new.tag, new.serial_socket, new.lease, new.boots) == (None, "", None, None, 0)
    assert new.layer.startswith("20-")
    for same in ("name", "project", "labels", "env", "created_at", "expires_at", "origin", "restarts", "manifest"):
        assert getattr(new, same) == getattr(row, same), same
    assert new.movable == msgspec.structs.replace(movable, epoch=4, move=None)
    assert (new.leaving, new.view.move) == (None, Move("h1", "h2", NOW, "moved"))
    boots = see(new, Woke(None))
    assert boots.status is Status.STARTING


@pytest.mark.parametrize(("generation", "waits"), [(1, True), (2, False)])
def test_a_workload_waits_for_a_client_as_before_the_move(generation: int, waits: bool) -> None:
    row = msgspec.structs.replace(leaving(), attach=True, generation=generation, booted=generation)
    snapshot = Snapshot(id="s1", name="moved-m1", status="ready", vm=row, created_at=NOW, move="m1")
    assert arrived_row(snapshot, vm_id=20, epoch=2, now=NOW).waits_for_client is waits


def test_a_vm_that_goes_on_from_a_replica_says_so() -> None:
    leaving = msgspec.structs.replace(LEAVING, replica=True)
    assert leaving.arrival == "replica-m1"
    row = msgspec.structs.replace(running(), leaving=leaving, replica=Replica(hosts=("h2",), at=NOW))
    snapshot = Snapshot(id="s1", name=leaving.arrival, status="ready", vm=row, created_at=NOW, move="m1")
    assert snapshot.is_replica
    later = NOW + timedelta(minutes=4)
    new = arrived_row(snapshot, vm_id=20, epoch=2, now=later)
    assert (new.desired, new.checkpoint, new.arrived, new.replica) == (Desired.RUNNING, "snapshot-s1", "m1", None)
    assert new.view.move == Move("h1", "h2", later, "restored")
