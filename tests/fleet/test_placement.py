"""Where a new VM goes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from volant.fleet import Wanted, place
from volant.model import HostView, Placement, Problem

HOST = HostView(
    name="h1",
    state="up",
    draining_since=None,
    address="192.0.2.1:7778",
    version="0",
    architecture="x86_64",
    accelerator="kvm",
    cpu_cores=8,
    memory_mb=16384,
    zone="",
    labels={},
    vms=0,
    used_cpu_cores=0,
    free_memory_mb=8192,
    free_disk_mb=10240,
)
WANTED = Wanted(memory_mb=512, disk_mb=1024, architecture="x86_64")


def host(name: str, **changes: Any) -> HostView:
    return msgspec.structs.replace(HOST, name=name, **changes)


def test_the_host_with_the_most_free_memory_comes_first() -> None:
    hosts = [host("h1", free_memory_mb=2048), host("h2", free_memory_mb=12288), host("h3", free_memory_mb=8192)]
    assert place(hosts, WANTED, here="h1") == ["h2", "h3", "h1"]


def test_of_hosts_that_differ_little_the_one_that_was_asked_comes_first() -> None:
    hosts = [host("h1", free_memory_mb=8200), host("h2", free_memory_mb=8100), host("h3")]
    assert place(hosts, WANTED, here="h3") == ["h3", "h1", "h2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "unreachable"}, "it gives no sign of life"),
        ({"draining_since": datetime(2026, 1, 1, tzinfo=UTC)}, "it is draining"),
        ({"architecture": "aarch64"}, "it is aarch64"),
        ({"free_memory_mb": 100}, "it has 100 MiB of memory left"),
        ({"free_disk_mb": 7}, "it has 7 MiB of disk left"),
    ],
)
def test_a_host_that_can_not_take_the_vm_is_left_out_and_the_reason_said(changes: dict[str, Any], reason: str) -> None:
    assert place([host("h1", **changes), host("h2")], WANTED, here="h1") == ["h2"]
    with pytest.raises(Problem) as refused:
        place([host("h1", **changes)], WANTED, here="h1")
    assert (refused.value.status, refused.value.code) == (503, "no-host")
    assert f"h1: {reason}" in refused.value.detail


VMS = {"h1": [{"app": "db", "tier": "1"}, {"app": "web"}], "h2": [{"app": "db", "tier": "2"}], "h3": []}


@pytest.mark.parametrize(
    ("placement", "fitting", "reason"),
    [
        (Placement(zone="b"), ["h2"], "h1: it is in zone 'a', h3: it is in no zone"),
        (Placement(labels={"disk": "nvme"}), ["h1", "h2"], "h3: it lacks the labels disk=nvme"),
        (Placement(labels={"disk": "nvme", "rack": "7"}), ["h2"], "h1: it lacks the labels disk=nvme, rack=7"),
        (Placement(affinity={"app": "web"}), ["h1"], "h2: it has no VM with app=web"),
        # All of them on one VM.
        (Placement(affinity={"app": "web", "tier": "1"}), [], "h1: it has no VM with app=web, tier=1"),
        (Placement(anti_affinity={"app": "db"}), ["h3"], "h1: it has a VM with app=db"),
        (Placement(zone="a", anti_affinity={"app": "db", "tier": "2"}), ["h1"], "h2: it is in zone 'b'"),
    ],
)
def test_a_vm_goes_where_its_request_says(placement: Placement, fitting: list[str], reason: str) -> None:
    hosts = [
        host("h1", zone="a", labels={"disk": "nvme"}),
        host("h2", zone="b", labels={"disk": "nvme", "rack": "7"}),
        host("h3"),
    ]
    wanted = msgspec.structs.replace(WANTED, placement=placement)

    def labels_on(name: str) -> list[dict[str, str]]:
        return VMS[name]

    if fitting:
        assert place(hosts, wanted, here="h1", labels_on=labels_on) == fitting
    left = [each for each in hosts if each.name not in fitting]
    with pytest.raises(Problem) as refused:
        place(left, wanted, here="h1", labels_on=labels_on)
    assert reason in refused.value.detail
