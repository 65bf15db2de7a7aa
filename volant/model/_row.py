"""The row of a VM that the journal stores, and the view of it that clients get."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from ._manifest import Env, Manifest
from ._network import MAX_PORTS, NONE, Lease, PortText, PublishedPort
from ._text import PLAIN_PATTERN, Duration, Labels, Name, Time
from .agent_types import WorkloadState


class Status(StrEnum):
    """The present state of a VM. Public."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    DELETING = "deleting"


READY: Literal["ready"] = "ready"
"""Running, with a workload that is healthy or has exited with 0. Without a health check, it is healthy once started."""
WAIT_STATES: tuple[str, ...] = (*(str(status) for status in Status), READY, "deleted")
"""The states that a client can wait for."""


class Desired(StrEnum):
    """The desired state of a VM. Public."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Phase(StrEnum):
    """The step of a VM between two states; `NONE` at rest."""

    NONE = ""
    IMAGE = "image"
    """Waiting for the files to boot from, which may have to be built or fetched."""
    LAUNCH = "launch"
    """The process tag is committed. A process with it may exist."""
    AGENT = "agent"
    """The process runs. Its agent has not answered yet."""
    PAUSE = "pause"
    """The guest is being paused, and may be paused already."""
    RESUME = "resume"
    """The guest is being resumed, and its clock set."""
    ASK = "ask"
    """The guest was asked to shut down."""
    KILL = "kill"
    """The process is being killed and its files removed."""
    REMOVE = "remove"
    """No process is left. The disk and other files are being removed."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """Identifies a process, also after a restart of the daemon or the host."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of `/proc/<pid>/stat`."""
    boot_id: str
    tag: str = msgspec.field(name="mark")
    """The process tag: a word on its command line by which the daemon finds it. No secret. `mark` is its name in stored
    rows and in JSON."""


class Reason(msgspec.Struct, frozen=True):
    """The reason for a VM's state."""

    code: str
    """A stable word: `guest_panicked`, `agent_timeout`, `launch_failed`, `control_lost`, …"""
    message: str
    console: tuple[str, ...] = ()
    """The last lines of the serial console."""


class Origin(msgspec.Struct, frozen=True):
    """The guest that a VM is a copy of."""

    kind: Literal["snapshot", "fork"]
    vm: str
    """The name of its VM at that time."""
    vm_id: int
    snapshot: str | None = None
    """The name of the snapshot; null for a fork."""
    paused_ms: float | None = None
    """How long that guest was paused; null until it is known."""


class WorkloadView(msgspec.Struct, frozen=True):
    """The state of a VM's workload, as the agent reports it."""

    state: WorkloadState
    exit_code: int | None = None
    """Of its last run, if that ended by itself."""
    error: str | None = None
    """Why it could not be started, how it ended, or what its failing health check said. For people."""


RestartPolicy = Literal["never", "on-failure", "always"]
BootMode = Literal["auto", "cold", "template"]
"""`auto`: as a clone of a template where there is one; `template`: as a clone, which may have to be waited for."""


FORK, SNAPSHOT = "fork-", "snapshot-"
"""Prefixes of the names of checkpoints, by kind."""


def is_checkpoint(template: str) -> bool:
    """Returns whether a name is that of a checkpoint, not of a template."""
    return template.startswith((FORK, SNAPSHOT))


MAX_DISK_MB = 16 * 1024 * 1024
KernelCmdline = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": 1024})]


class CreateVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms`."""

    name: Name
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """None: the plugin's; 1 for `base`."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """None: the plugin's; 256 for `base`."""
    plugin: Name = "base"
    runtime: Name | None = None
    kernel_cmdline: KernelCmdline = ""
    """Appended to the daemon's own."""
    labels: Labels = {}
    env: Env = {}
    """For the workload. Overrides the manifest's."""
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    """Whether a boot may clone a template, or must."""
    ttl: Duration | None = None
    """A duration from `1s` to `366d`. The VM is deleted so long after its creation."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """The size of its disk, and so the limit on the host. None: the size of the plugin's root filesystem."""
    network: Name | None = None
    """`none`, `bridge`, `user`, or the name of a network; None: the daemon's setting."""
    ports: Annotated[tuple[PortText, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_PORTS})] = ()
    """Ports of the host that lead to the VM, each as `[host:]host_port:guest_port[/tcp|udp]`. The default is TCP on
    127.0.0.1."""


class BuildTemplate(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/templates`: the members of a VM that would clone it."""

    plugin: Name = "base"
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """None: the plugin's."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """None: the plugin's."""
    kernel_cmdline: KernelCmdline = ""
    env: Env = {}
    """Only counts with `template.after: workload`."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """The size of their disks. None: the size of the plugin's root filesystem."""
    network: Name | None = None
    """`none`, or another one: all of these have the same template. None: the daemon's setting."""


class VmRow(msgspec.Struct, frozen=True, kw_only=True):
    """The durable state of a VM. Only `decide` changes it, and only the journal stores it."""

    id: int
    name: str
    cpu_cores: int
    memory_mb: int
    plugin: str
    runtime: str
    manifest: Manifest
    """As it was when the VM was created."""
    kernel_cmdline: str = ""
    labels: dict[str, str] = {}
    env: dict[str, str] = {}
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    layer: str = ""
    """The name of its copy-on-write layer over the manifest's root filesystem. It is never used again, so neither a new
    nor a restored database gives a VM the disk of another. Empty: it has none."""
    disk_mb: int | None = None
    """The size of its disk. None: the size of the root filesystem."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network. This and the following members never change."""
    network_reason: str = "it was created before there were networks"
    """Why it has this network."""
    network_fallback: bool = False
    """Whether it is less than an operator would expect."""
    lease: Lease | None = None
    """None: it has no NIC."""
    ports: tuple[PublishedPort, ...] = ()

    desired: Desired = Desired.RUNNING
    generation: int = 1
    """The number of the desired boot. `start` and `restart` raise it."""
    grace_s: float = 10.0
    """How long the guest may take to shut down."""

    status: Status = Status.PENDING
    phase: Phase = Phase.NONE
    reason: Reason | None = None
    booted: int = 0
    """The generation of the last boot that was tried."""
    boots: int = 0
    """The number of launched processes."""
    restarts: int = 0
    """Restarts by the restart policy since the last `start` by a client."""
    started_at: datetime | None = None
    image: str | None = None
    """The digest of the last boot's image."""
    template: str | None = None
    """What the newest boot goes on from: the digest of a template, or of a checkpoint; None: it is a cold one."""
    fallback: Reason | None = None
    """Why the last boot is a cold one, although there was a template."""
    balloon: bool = False
    """Whether the machine of the last boot has the device that returns freed memory to the host. A copy of it must have
    one too."""
    origin: Origin | None = None
    """The guest that it is a copy of; None: it is no copy."""
    checkpoint: str | None = msgspec.field(default=None, name="capture")
    """The name of the checkpoint that its first boot continues from; None once it has run."""
    tag: str = msgspec.field(default="", name="mark")
    """The process tag of the last boot, committed before the launch. Empty once nothing of the process is left."""
    process: ProcessIdentity | None = None
    serial_socket: str | None = None
    """The path of the serial console's socket."""
    hypervisor: str | None = None
    accelerator: Literal["kvm", "tcg"] | None = None
    agent_seen: bool = False
    """Whether the agent of this process has ever answered."""
    workload: WorkloadView | None = None
    """The last reported state of this boot's workload; None: it has none, or has not reported yet."""
    found_boot: int = 0
    """The number of the boot that was adopted as an orphan, so what its guest was sent is unknown. 0: none."""
    revision: int = 0
    """Raised by the journal with each commit."""

    @property
    def ip_address(self) -> str:
        """Empty: it has none."""
        return self.lease.address if self.lease is not None else ""

    @property
    def boot_key(self) -> str:
        """Identifies one boot of one VM, for instance in log positions."""
        return f"{self.id}.{self.boots}"


class VmView(msgspec.Struct, frozen=True, kw_only=True):
    """The view of a VM that clients get."""

    id: int
    name: str
    status: Status
    desired: Desired
    reason: Reason | None
    plugin: str
    runtime: str
    pid: int | None
    ip_address: str
    mac_address: str
    cpu_cores: int
    memory_mb: int
    kernel_cmdline: str
    serial_socket: str | None
    labels: Mapping[str, str]
    hypervisor: str | None
    accelerator: Literal["kvm", "tcg"] | None
    restart_policy: RestartPolicy
    restarts: int
    boots: int
    boot: BootMode
    booted_from: Literal["cold", "template", "snapshot", "fork"] | None
    """The last boot; None before the first one."""
    fallback: Reason | None
    """Why the last boot is a cold one, although it began as a clone."""
    disk: Literal["none", "overlay"]
    created_at: Time
    updated_at: Time
    started_at: Time | None
    disk_mb: int | None = None
    """The requested size of the disk; null: the size of the root filesystem."""
    origin: Origin | None = None
    """The guest that it is a copy of; null: it is no copy."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network."""
    network_reason: str = ""
    """Why it has this network."""
    ports: tuple[str, ...] = ()
    """Of the host that lead to its own, each as `host:host_port:guest_port/protocol`."""
    workload: WorkloadView | None = None
    """The state of its workload; null if the VM does not run or has none."""
    expires_at: Time | None = None
    """When it is deleted automatically; null: never."""
    warnings: tuple[str, ...] = ()
    """What the VM lacks that you would expect, and what to do."""


def view(row: VmRow) -> VmView:
    """Returns what clients see of `row`."""
    return VmView(
        id=row.id,
        name=row.name,
        status=row.status,
        desired=row.desired,
        reason=row.reason,
        plugin=row.plugin,
        runtime=row.runtime,
        pid=row.process.pid if row.process else None,
        ip_address=row.ip_address,
        mac_address=row.lease.mac if row.lease is not None else "",
        network=row.network,
        network_reason=row.network_reason,
        warnings=(f"the network is {row.network!r}: {row.network_reason}",) if row.network_fallback else (),
        ports=tuple(map(str, row.ports)),
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        kernel_cmdline=row.kernel_cmdline,
        serial_socket=row.serial_socket if row.process else None,
        labels=row.labels,
        hypervisor=row.hypervisor,
        accelerator=row.accelerator,
        restart_policy=row.restart_policy,
        restarts=row.restarts,
        boots=row.boots,
        boot=row.boot,
        booted_from=_booted_from(row),
        fallback=row.fallback,
        origin=row.origin,
        disk="overlay" if row.layer else "none",
        disk_mb=row.disk_mb,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        workload=_workload(row),
        expires_at=row.expires_at,
    )


def _workload(row: VmRow) -> WorkloadView | None:
    if row.status not in (Status.RUNNING, Status.PAUSED) or row.manifest.workload is None:
        return None
    return row.workload or WorkloadView("starting")


def readiness(row: VmRow) -> Literal["met", "failed"] | None:
    """Returns whether a running VM is `ready` or can't become so; None: not yet."""
    if row.status is not Status.RUNNING:
        return None
    workload = _workload(row)
    if workload is None or workload.state in ("healthy", "exited"):
        return "met"
    return "failed" if workload.state == "failed" else None


def _booted_from(row: VmRow) -> Literal["cold", "template", "snapshot", "fork"] | None:
    if not row.boots:
        return None
    if row.template is None:
        return "cold"
    return row.origin.kind if row.origin is not None and is_checkpoint(row.template) else "template"
