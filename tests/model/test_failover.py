"""A VM that another host may start: what it may not have, and what the one that is started there keeps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from tests.model.kit import see
from volant.model import (
    BASE,
    CreateVm,
    EventId,
    Movable,
    Move,
    Origin,
    Placement,
    Problem,
    Reason,
    Replica,
    Replicated,
    copied_row,
    new_row,
    record_of_vm,
    replica_event,
    unreachable_view,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def request(**members: Any) -> CreateVm:
    return msgspec.convert({"name": "web", "failover": "restart", **members}, CreateVm)


@pytest.mark.parametrize(
    "members",
    [
        {"volumes": ["data:/data"]},
        {"volumes": ["/srv:/srv"]},
        {"image": "oci:/images/web"},
        {"image": "oci-archive:/images/web.tar"},
        {"image": "docker-archive:/images/web.tar"},
    ],
)
def test_what_one_host_has_can_not_be_had_elsewhere(members: dict[str, Any]) -> None:
    with pytest.raises(Problem) as refused:
        new_row(request(**members), BASE, vm_id=1, now=NOW)
    assert (refused.value.status, refused.value.code, refused.value.field) == (422, "contradictory-request", "failover")
    new_row(request(**members | {"failover": "never"}), BASE, vm_id=1, now=NOW)


def test_a_vm_that_was_taken_over_ends_when_it_would_have_ended() -> None:
    wanted = request(ttl="1h")
    ends = NOW + timedelta(hours=1)
    first = new_row(wanted, BASE, vm_id=1, now=NOW, movable=Movable(id="a", request=wanted, expires_at=ends))
    move = Move("h1", "h2", NOW + timedelta(minutes=50), "taken_over")
    movable = Movable(id="a", epoch=2, request=wanted, expires_at=first.expires_at, move=move)
    second = new_row(wanted, BASE, vm_id=2, now=NOW + timedelta(minutes=50), movable=movable)
    assert second.expires_at == first.expires_at
    shown = second.view
    assert (shown.failover, shown.move) == ("restart", move)


def test_a_copy_is_not_movable() -> None:
    """It goes on from memory and a disk that its host has."""
    wanted = request(placement={"zone": "r1", "anti_affinity": {"app": "db"}})
    row = new_row(wanted, BASE, vm_id=1, now=NOW, movable=Movable(id="a", request=wanted))
    assert row.view.placement == Placement(zone="r1", anti_affinity={"app": "db"})
    copy = copied_row(row, vm_id=2, name="copy", origin=Origin("fork", "web", 1), checkpoint="fork-1", now=NOW)
    assert copy.movable is None
    assert (copy.view.failover, copy.view.placement) == ("never", None)


@pytest.mark.parametrize(
    ("members", "status", "field"),
    [
        ({}, 400, "replicate"),
        ({"replicate": {"every": "soon"}}, 400, "replicate.every"),
        ({"replicate": {"every": "1s"}}, 400, "replicate.every"),
        ({"replicate": {"every": "2d"}}, 400, "replicate.every"),
        ({"replicate": {"every": "5m"}, "failover": "restart"}, 422, "replicate"),
        ({"replicate": {"every": "5m"}, "failover": "never"}, 422, "replicate"),
        ({"replicate": {"every": "5m"}, "volumes": ["data:/data"]}, 422, "failover"),
        ({"replicate": {"every": "5m"}, "image": "oci:/images/web"}, 422, "failover"),
    ],
)
def test_a_request_to_restore_a_vm_says_how_often_it_is_copied(
    members: dict[str, Any], status: int, field: str
) -> None:
    with pytest.raises(Problem) as refused:
        new_row(request(**({"failover": "restore"} | members)), BASE, vm_id=1, now=NOW)
    assert (refused.value.status, refused.value.field) == (status, field)
    assert refused.value.hint is not None or refused.value.status == 400


@pytest.mark.parametrize("to", [0, 4])
def test_there_are_one_to_three_copies(to: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        request(failover="restore", replicate={"every": "5m", "to": to})


def test_the_view_says_how_old_the_newest_replica_is_or_why_there_is_none() -> None:
    wanted = request(failover="restore", replicate={"every": "5m"})
    row = new_row(wanted, BASE, vm_id=1, now=NOW, movable=Movable(id="a", request=wanted))
    shown = row.view
    assert (shown.failover, shown.replicate) == ("restore", wanted.replicate)
    assert shown.replica is not None
    assert (shown.replica.at, shown.replica.reason and shown.replica.reason.code) == (None, "replica_due")
    made = Replica(hosts=("h2",), at=NOW)
    row = see(row, Replicated(made))
    assert row.view.replica == made
    lost = unreachable_view(row.key, record_of_vm(row, "h1"))
    assert (lost.failover, lost.replica) == ("restore", made)
    assert "continues it: h2" in lost.warnings[0]
    none = unreachable_view(row.key, record_of_vm(see(row, Replicated(Replica())), "h1"))
    assert "no host has a replica" in none.warnings[0]
    # One that is this host's alone has none.
    assert msgspec.structs.replace(row, movable=None).view.replica is None


def test_an_event_says_once_for_each_reason_that_a_vm_is_not_replicated() -> None:
    wanted = request(failover="restore", replicate={"every": "5m"})
    row = new_row(wanted, BASE, vm_id=1, now=NOW, movable=Movable(id="a", request=wanted))
    messages = []
    for reason in (
        None, Reason("no_host", "h2 has 5 MiB"), Reason("no_host", "h2 has 6 MiB"), None, Reason("no_host", "again"),
        Reason("replica_slow", "an hour"),
    ):  # fmt: skip
        after = see(row, Replicated(Replica(reason=reason)))
        event = replica_event(row, after, event_id=EventId("e", 1), now=NOW)
        messages.append(None if event is None else event.message)
        row = after
    assert [text and text.rpartition(": ")[2] for text in messages] == [
        None,
        "h2 has 5 MiB",
        None,
        None,
        "again",
        "an hour",
    ]
