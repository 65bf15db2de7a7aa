"""What is known of a VM: the row that the journal keeps, and the view that the API shows of it."""

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
    """What a VM is seen to be. Public."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    DELETING = "deleting"


READY: Literal["ready"] = "ready"
"""Running, and its workload is healthy or has ended well; without a health check it is healthy once it has started."""
WAIT_STATES: tuple[str, ...] = (*(str(status) for status in Status), READY, "deleted")
"""What a client can wait for a VM to be."""


class Desired(StrEnum):
    """What a VM should be. Public."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Phase(StrEnum):
    """The step that a VM is in while its status is on its way somewhere; `NONE` at rest."""

    NONE = ""
    IMAGE = "image"
    """Waiting for what it boots from, which may have to be built or fetched."""
    LAUNCH = "launch"
    """The tag is committed; a process that carries it may exist."""
    AGENT = "agent"
    """The process runs; its agent has not answered yet."""
    PAUSE = "pause"
    """The guest is being made to stand still, and may do so already."""
    RESUME = "resume"
    """The guest is being let go on, and told the time."""
    ASK = "ask"
    """The guest was asked to shut down."""
    KILL = "kill"
    """The process is being ended and its files removed."""
    REMOVE = "remove"
    """No process is left; what else belongs to the VM is being removed."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process that can be told from every other one, also after a restart of the daemon or of the host."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of `/proc/<pid>/stat`."""
    boot_id: str
    tag: str = msgspec.field(name="mark")
    """The process tag: a word on its command line by which the daemon finds it. No secret. `mark` is its name in stored
    rows and in JSON."""


class Reason(msgspec.Struct, frozen=True):
    """Why a VM is where it is."""

    code: str
    """A stable word: `guest_panicked`, `agent_timeout`, `launch_failed`, `control_lost`, …"""
    message: str
    console: tuple[str, ...] = ()
    """The last lines of the serial console."""


class Origin(msgspec.Struct, frozen=True):
    """Of which guest a VM began as a copy."""

    kind: Literal["snapshot", "fork"]
    vm: str
    """Its name then."""
    vm_id: int
    snapshot: str | None = None
    """The name of the snapshot; null for a fork."""
    paused_ms: float | None = None
    """For how long that guest stood still; null until it is known."""


class WorkloadView(msgspec.Struct, frozen=True):
    """How a VM's workload is, as the agent in the guest says."""

    state: WorkloadState
    exit_code: int | None = None
    """Of its last run, when that ended by itself."""
    error: str | None = None
    """Why it could not be started, how it ended, or what its failing health check said. For people."""


RestartPolicy = Literal["never", "on-failure", "always"]
BootMode = Literal["auto", "cold", "template"]
"""`auto`: as a clone of a template where there is one; `template`: as a clone, which may have to be waited for."""


FORK, SNAPSHOT = "fork-", "snapshot-"
"""What the name of a checkpoint begins with, by who keeps it."""


def is_checkpoint(template: str) -> bool:
    """Whether what a boot goes on from was copied of another VM, and is no template."""
    return template.startswith((FORK, SNAPSHOT))


MAX_DISK_MB = 16 * 1024 * 1024
KernelCmdline = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": 1024})]


class CreateVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms`."""

    name: Name
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """None: what the plugin asks for; 1 for `base`."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """None: what the plugin asks for; 256 for `base`."""
    plugin: Name = "base"
    runtime: Name | None = None
    kernel_cmdline: KernelCmdline = ""
    """Appended to the daemon's own."""
    labels: Labels = {}
    env: Env = {}
    """For the workload, over the manifest's."""
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    """Whether a boot may go on from a template, or must."""
    ttl: Duration | None = None
    """A duration from creation, from `1s` to `366d`; the VM is deleted then."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """How large its disk is, and so what it may take of the host's; None: as large as the plugin's root filesystem."""
    network: Name | None = None
    """`none`, `bridge`, `user`, or the name of a network; None: the daemon's setting."""
    ports: Annotated[tuple[PortText, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_PORTS})] = ()
    """Of the host that lead to the VM's, each as `[host:]host_port:guest_port[/tcp|udp]`, on 127.0.0.1 and TCP without
    a word."""


class BuildTemplate(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/templates`: what a VM would be created with."""

    plugin: Name = "base"
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """None: what the plugin asks for."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """None: what the plugin asks for."""
    kernel_cmdline: KernelCmdline = ""
    env: Env = {}
    """Counts with `template.after: workload` alone."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """How large their disk is; None: as large as the plugin's root filesystem."""
    network: Name | None = None
    """`none`, or another one: all of these have the same template. None: the daemon's setting."""


class VmRow(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must survive about a VM. Changed only by `decide`, kept only by the journal."""

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
    """Names its copy-on-write layer over the manifest's root filesystem, unlike any other that ever was: so neither a
    new database nor a restored one gives a VM the disk of another. Empty: it has none."""
    disk_mb: int | None = None
    """How large its disk is; None: as large as the root filesystem."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network. It and what follows are the same for as long as there is the
    VM."""
    network_reason: str = "it was created before there were networks"
    """Why it has that one."""
    network_fallback: bool = False
    """Whether it is a lesser one than was to be expected when the VM was created."""
    lease: Lease | None = None
    """None: it has no NIC."""
    ports: tuple[PublishedPort, ...] = ()

    desired: Desired = Desired.RUNNING
    generation: int = 1
    """The boot that is wanted: `start` and `restart` raise it."""
    grace_s: float = 10.0
    """How long the guest is given when it is asked to stop."""

    status: Status = Status.PENDING
    phase: Phase = Phase.NONE
    reason: Reason | None = None
    booted: int = 0
    """The generation of the newest boot that was tried."""
    boots: int = 0
    """How often a process was launched."""
    restarts: int = 0
    """How often the restart policy started it again, since somebody last did."""
    started_at: datetime | None = None
    image: str | None = None
    """Digest of the boot image of the newest boot."""
    template: str | None = None
    """What the newest boot goes on from: the digest of a template, or of a checkpoint; None: it is a cold one."""
    fallback: Reason | None = None
    """Why the newest boot is a cold one, although there was a template."""
    balloon: bool = False
    """Whether the machine of the newest boot has the device by which freed memory goes back to the host. One that goes
    on from where it is must have it too."""
    origin: Origin | None = None
    """Whose copy it is; None: nobody's."""
    checkpoint: str | None = msgspec.field(default=None, name="capture")
    """What its next boot goes on from, until it has run: the name of what was copied of its origin."""
    tag: str = msgspec.field(default="", name="mark")
    """The process tag of the newest boot, committed before the launch; empty once nothing of the process is left."""
    process: ProcessIdentity | None = None
    serial_socket: str | None = None
    """Where the daemon serves the serial console while there is a process."""
    hypervisor: str | None = None
    accelerator: Literal["kvm", "tcg"] | None = None
    agent_seen: bool = False
    """Whether the agent of this process has ever answered."""
    workload: WorkloadView | None = None
    """How the workload of this boot was last; None: it has none, or nothing was heard of it yet."""
    found_boot: int = 0
    """Of `boots`, the one that was found on the host without a row and adopted: what its guest was told nobody knows.
    0: none."""
    revision: int = 0
    """Raised by the journal with each commit."""

    @property
    def ip_address(self) -> str:
        """Empty: it has none."""
        return self.lease.address if self.lease is not None else ""

    @property
    def boot_key(self) -> str:
        """Names one boot of one VM, for instance in the positions of its logs."""
        return f"{self.id}.{self.boots}"


class VmView(msgspec.Struct, frozen=True, kw_only=True):
    """A VM as the API shows it."""

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
    """The newest boot; None before there was one."""
    fallback: Reason | None
    """Why it is a cold one, although it began as a clone of a template."""
    disk: Literal["none", "overlay"]
    created_at: Time
    updated_at: Time
    started_at: Time | None
    disk_mb: int | None = None
    """How large the disk was asked to be; null: as large as the root filesystem."""
    origin: Origin | None = None
    """Of which guest it began as a copy; null: of none."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network."""
    network_reason: str = ""
    """Why it has that one."""
    ports: tuple[str, ...] = ()
    """Of the host that lead to its own, each as `host:host_port:guest_port/protocol`."""
    workload: WorkloadView | None = None
    """How its workload is; null while the VM does not run, and where it has none."""
    expires_at: Time | None = None
    """When it is deleted by itself; null: never."""
    warnings: tuple[str, ...] = ()
    """What is less than was to be expected when it was created, and what to do."""


def view(row: VmRow) -> VmView:
    """What clients see of `row`."""
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
    """Whether a VM that runs is `ready`, or won't be; None: not yet."""
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
