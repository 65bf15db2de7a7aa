"""Views of the hosts of a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from ._project import Key
from ._row import Desired, Failover, ImageOfVm, Replica, Replicate, Status, VmRow, VmView
from ._text import Time

HostState = Literal["up", "unreachable"]
"""Whether a host is reachable. VMs of an unreachable host may still run."""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a host that stay the same while its daemon runs."""

    address: str
    """The address at which other hosts reach it, `HOST:PORT`."""
    version: str
    architecture: str
    accelerator: str | None = None
    """Null while it is being chosen."""
    cpu_cores: int
    memory_mb: int
    zone: str = ""
    labels: Mapping[str, str] = {}


class HostLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a host, as it last reported it."""

    vms: int = 0
    cpu_cores: int = 0
    """The cores of all its VMs together."""
    free_memory_mb: int = 0
    """The memory that is free for a new VM."""
    free_disk_mb: int = 0
    event_id: str = ""
    """The id of the newest event in its journal."""


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host of the fleet."""

    name: str
    state: HostState
    draining_since: Time | None
    """The time since which it gets no new VMs; null if it gets new VMs."""
    address: str
    """The address at which other hosts reach it, `HOST:PORT`."""
    version: str
    architecture: str
    accelerator: str | None
    cpu_cores: int
    memory_mb: int
    zone: str
    labels: Mapping[str, str]
    vms: int
    """The number of its VMs. This and the following figures are from its last report."""
    used_cpu_cores: int
    free_memory_mb: int
    free_disk_mb: int


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet, as seen by the host that answers."""

    host: str
    """The host that answers."""
    hosts: int
    unreachable: tuple[str, ...]
    """The names of unreachable hosts."""
    vms: int
    etcd: Literal["ok", "unreachable"]
    age_s: float | None
    """Seconds since the last news from etcd; null if nothing has been read yet."""
    trouble: str | None
    """The problem; null if there is none."""
    fence: Literal["open", "closed", "unavailable"] = "unavailable"
    """Whether the host that answers may run its movable VMs, which other hosts may start. `closed`: they are paused
    until etcd answers; `unavailable`: the host can have no movable VMs."""
    fence_obstacle: str | None = None
    """Why the host can have no movable VMs."""
    conflicts: tuple[str, ...] = ()
    """The objects of the host that answers whose names other hosts use too, as `project/name`. Each host finds only its
    own object under such a name."""


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data that all hosts have of a VM, for the time when its own host is unreachable."""

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
    """Returns the data that other hosts need of a VM of this host."""
    shown = row.view
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
    """Returns the view of a VM whose host is unreachable."""
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
        warnings=(f"the host {record.host!r} gives no sign of life; this is its last report{_hope(record)}",),
    )


def _hope(record: VmRecord) -> str:
    """Returns how a VM with replicas continues, as the end of a sentence."""
    if record.replica is None:
        return ""
    if not record.replica.hosts:
        return ", and no host has a replica to continue it from: it continues when its host is back"
    return f", and a host that has its newest replica continues it: {', '.join(record.replica.hosts)}"
