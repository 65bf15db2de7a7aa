"""Hosts of a fleet, as clients see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from ._project import Key
from ._row import Desired, Failover, ImageOfVm, Replica, Replicate, Status, VmRow, VmView, view
from ._text import Time

HostState = Literal["up", "unreachable"]
"""Whether a host gives a sign of life. What runs on one that does not may still run."""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the daemon of a host runs."""

    address: str
    """Where other hosts reach it, `HOST:PORT`."""
    version: str
    architecture: str
    accelerator: str | None = None
    """None: it is being chosen."""
    cpu_cores: int
    memory_mb: int
    zone: str = ""
    labels: Mapping[str, str] = {}


class HostLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a host is, as it last reported."""

    vms: int = 0
    cpu_cores: int = 0
    """Of its VMs together."""
    free_memory_mb: int = 0
    """What a new VM could take."""
    free_disk_mb: int = 0
    event_id: str = ""
    """The newest event of its journal."""


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host of the fleet."""

    name: str
    state: HostState
    draining_since: Time | None
    """Since when it gets no new VMs; null: it gets some."""
    address: str
    """Where other hosts reach it, `HOST:PORT`."""
    version: str
    architecture: str
    accelerator: str | None
    cpu_cores: int
    memory_mb: int
    zone: str
    labels: Mapping[str, str]
    vms: int
    """As it last reported, as are the figures that follow."""
    used_cpu_cores: int
    free_memory_mb: int
    free_disk_mb: int


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet, as the host that answers sees it."""

    host: str
    """The one that answers."""
    hosts: int
    unreachable: tuple[str, ...]
    """The names of hosts that give no sign of life."""
    vms: int
    etcd: Literal["ok", "unreachable"]
    age_s: float | None
    """For so many seconds nothing is known of etcd; null: nothing has been read yet."""
    trouble: str | None
    """What is wrong; null: nothing."""
    fence: Literal["open", "closed", "unavailable"] = "unavailable"
    """Whether the host that answers may run its movable VMs, those that other hosts may start. `closed`: they are
    paused until etcd answers; `unavailable`: it can have none."""
    fence_obstacle: str | None = None
    """Why it can have none."""
    conflicts: tuple[str, ...] = ()
    """What the host that answers has under names that other hosts have too, as `project/name`: only this host finds its
    own."""


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all hosts know of a VM, for when its own can't be asked."""

    host: str
    id: int
    status: Status
    desired: Desired
    plugin: str
    runtime: str
    cpu_cores: int
    memory_mb: int
    labels: Mapping[str, str] = {}
    image: ImageOfVm | None = None
    failover: Failover = "never"
    replicate: Replicate | None = None
    replica: Replica | None = None
    created_at: Time
    updated_at: Time


def record_of_vm(row: VmRow, host: str) -> VmRecord:
    """Returns what other hosts have to know of a VM of this host."""
    shown = view(row)
    return VmRecord(
        host=host,
        id=row.id,
        status=row.status,
        desired=row.desired,
        plugin=row.plugin,
        runtime=row.runtime,
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        labels=row.labels,
        image=shown.image,
        failover=shown.failover,
        replicate=shown.replicate,
        replica=shown.replica,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def unreachable_view(vm: Key, record: VmRecord) -> VmView:
    """Returns what clients see of a VM whose host gives no sign of life."""
    return VmView(
        id=record.id,
        name=vm.name,
        project=vm.project,
        status=record.status,
        desired=record.desired,
        reason=None,
        plugin=record.plugin,
        runtime=record.runtime,
        pid=None,
        ip_address="",
        mac_address="",
        cpu_cores=record.cpu_cores,
        memory_mb=record.memory_mb,
        kernel_cmdline="",
        serial_socket=None,
        labels=record.labels,
        hypervisor=None,
        accelerator=None,
        restart_policy="never",
        restarts=0,
        boots=0,
        boot="auto",
        booted_from=None,
        fallback=None,
        disk="none",
        created_at=record.created_at,
        updated_at=record.updated_at,
        started_at=None,
        image=record.image,
        failover=record.failover,
        replicate=record.replicate,
        replica=record.replica,
        unreachable=record.host,
        warnings=(f"the host {record.host!r} gives no sign of life; this is what it last reported{_hope(record)}",),
    )


def _hope(record: VmRecord) -> str:
    """Returns what becomes of a VM that is to be restored, after the rest of a sentence."""
    if record.replica is None:
        return ""
    if not record.replica.hosts:
        return ", and no host has a replica to continue it from: it goes on when its host is back"
    return f", and a host that has its newest replica continues it: {', '.join(record.replica.hosts)}"
