"""The row of a VM that the journal stores, and its view for clients."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Literal

import msgspec

from ._egress import EGRESS_ALL, Egress, EgressRequest
from ._manifest import Arguments, Env, EnvWithSecrets, HealthCheck, Manifest, OnExit
from ._network import MAX_PORTS, NONE, Lease, PortText, PublishedPort
from ._project import DEFAULT_PROJECT, Key
from ._secret import MAX_SECRETS_OF_VM, SecretFile, SecretText, secrets_of
from ._text import PLAIN_PATTERN, Duration, Labels, Name, Time
from ._volume import MAX_VOLUMES, DirectoryMount, VolumeMount, VolumeText
from ._workload_state import WorkloadState


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
"""A running VM whose workload is healthy or has exited with 0. Without a health check, a workload is healthy once it
has started. A VM that stopped because its workload exited with 0 counts too."""
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
    """Waiting for the files to boot from, which may have to be built or fetched first."""
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
    tag: str
    """The process tag: a word on the command line by which the daemon finds the process. Not a secret."""


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
    """The name of the source VM at that time."""
    vm_id: int
    snapshot: str | None = None
    """The name of the snapshot; null for a fork."""
    paused_ms: float | None = None
    """How long the source guest was paused; null until known."""
    snapshot_id: str | None = None
    """The snapshot's id, which no later snapshot gets; null for a fork."""


class WorkloadView(msgspec.Struct, frozen=True):
    """The state of a VM's workload, as the agent reports it."""

    state: WorkloadState
    exit_code: int | None = None
    """The exit code of its last run, if that ended by itself."""
    error: str | None = None
    """Why it could not be started, how it ended, or the output of its failing health check. For people."""
    signal: int | None = None
    """The number of the signal that ended its last run."""
    pid: int | None = None
    """The process id in the guest; null while it does not run."""
    restarts: int = 0
    """The number of restarts by the agent in this boot."""

    @property
    def has_ended(self) -> bool:
        """Whether it has ended or could not be started, and is not restarted."""
        return self.state in ("exited", "failed")


RestartPolicy = Literal["never", "on-failure", "always"]
Failover = Literal["never", "restart", "restore"]
"""The action when a VM's host becomes unreachable: none; another host boots the VM again; or another host continues it
from its newest replica."""
BootMode = Literal["auto", "cold", "template"]
"""`auto`: clone a template if there is one; `template`: clone a template, and wait for it if necessary."""


FORK, SNAPSHOT = "fork-", "snapshot-"
"""The prefixes of checkpoint names, by kind."""


def is_checkpoint(template: str) -> bool:
    """Returns whether a name is that of a checkpoint, not of a template."""
    return template.startswith((FORK, SNAPSHOT))


MAX_DISK_MB = 16 * 1024 * 1024
MIN_IOPS, MAX_IOPS = 10, 10**9
"""With a limit below the minimum, a boot misses its deadline."""
MAX_MBPS = 10**6
KernelCmdline = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": 1024})]


class Placement(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The hosts of the fleet on which a VM may run. Facts about hosts and VMs are some seconds old."""

    zone: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": PLAIN_PATTERN, "maxLength": 128})] | None = None
    """Only hosts in this zone."""
    labels: Labels = {}
    """Only hosts with these labels."""
    affinity: Labels = {}
    """Only hosts with a VM of the project that has all of these labels."""
    anti_affinity: Labels = {}
    """Only hosts without a VM of the project that has all of these labels."""


MAX_REPLICAS = 3


class Replicate(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How often a VM is copied to other hosts, and to how many of them."""

    every: Duration
    """A duration from `10s` to `1d`."""
    to: Annotated[int, msgspec.Meta(ge=1, le=MAX_REPLICAS)] = 1
    """The number of other hosts with its newest copy."""


class CreateVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms`."""

    name: Name
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """The number of CPU cores. Null for the plugin's; 1 for `base`."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """The memory in MiB. Null for the plugin's; 256 for `base`, 512 with an `image`."""
    plugin: Name = "base"
    image: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    """An OCI image in place of a plugin: `name:tag`, `registry:5000/name:tag`, `name@sha256:…`, or a file of the
    daemon's host as `oci:/path`, `oci-archive:/path` or `docker-archive:/path`. The VM keeps the digest that it has
    now. The members from `registry_secret` to `publish_all` need an image. `command`, `entrypoint`, `user`, `workdir`,
    `stop_signal` and `health_check` override the image's own settings."""
    registry_secret: Name | None = None
    """A secret of the project: an auth file with credentials for the image's registry, instead of
    `Volant-Registry-Auth`. It is read when the image is fetched."""
    command: Arguments | None = None
    """The arguments of the image's entrypoint; without an entrypoint, the program and its arguments."""
    entrypoint: Arguments | None = None
    """The entrypoint. It replaces the image's command too. Empty for no entrypoint."""
    user: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    """`user`, `uid`, `user:group` or `uid:gid`, with names from the image."""
    workdir: Annotated[str, msgspec.Meta(max_length=4095)] | None = None
    """An absolute path in the image."""
    stop_signal: Annotated[str, msgspec.Meta(max_length=32)] | None = None
    """The signal that stops the program when the VM stops: a name or a number. Defaults to the image's, otherwise to
    SIGTERM."""
    health_check: HealthCheck | Literal["none"] | None = None
    """The agent's health check of the program; `none` for no check."""
    start_workload: bool = True
    """Whether the image's program starts with the VM."""
    attach: bool = False
    """Whether the program waits in the first boot until a client attaches to it
    (`GET /api/v1/vms/{name}/agent/v1/exec?workload=true`), so that it has a terminal or standard input and no output is
    lost. It fails if no client attaches within a minute. In later boots it starts with the VM."""
    on_exit: OnExit = "stop"
    """The fate of the VM when the program has ended. `keep`: it runs on. `stop`: it stops. `delete`: it is deleted,
    also when it stops for another reason and is not restarted. A VM that has crashed is kept."""
    publish_all: bool = False
    """Whether each port that the image exposes gets a free port of the host."""
    runtime: Name | None = None
    kernel_cmdline: KernelCmdline = ""
    """Appended to the daemon's own kernel command line. Every user of the host can read it."""
    labels: Labels = {}
    env: EnvWithSecrets = {}
    """The environment of the workload. It overrides the manifest's or the image's. A value of the form
    `{"secret": "name"}` is that secret of the VM's project, read at each boot."""
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    """Whether a boot may clone a template, or must."""
    ttl: Duration | None = None
    """The lifetime after which the VM is deleted: a duration from `1s` to `366d`."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """The size of its disk, and so the limit on the host. Null for the size of the plugin's root filesystem; 10240 with
    an `image`."""
    network: Name | None = None
    """`none`, `bridge`, `user`, or the name of a network; null for the daemon's setting."""
    ports: Annotated[tuple[PortText, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_PORTS})] = ()
    """Ports of the host that lead to the VM, each as `[host:]host_port:guest_port[/tcp|udp]`. The default is TCP on
    127.0.0.1."""
    egress: EgressRequest | None = None
    """The destinations that the VM may connect to: `none`, `all`, or rules, each for a network (`cidr`) or a DNS name
    (`name`). Unless it is `all`, the daemon answers the VM's DNS queries. Null for `all`."""
    volumes: Annotated[tuple[VolumeText, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_VOLUMES})] = ()
    """Volumes to mount, each as `name:/path`, with `:ro`, `:nocopy` or `:ro,nocopy`, and directories of the host, each
    as `/host/path:/path`, with `:rw` to write. The VM boots cold. The VM's files at the path are copied to an empty
    volume, unless it has `nocopy`."""
    secrets: Annotated[tuple[SecretText, ...], msgspec.Meta(extra_json_schema={"maxItems": MAX_SECRETS_OF_VM})] = ()
    """Secrets of the VM's project as files in its memory, each as `name`, for `/run/secrets/name`, or as
    `name:/run/path`. The files belong to the workload's user, with the mode 0400."""
    disk_iops: Annotated[int, msgspec.Meta(ge=MIN_IOPS, le=MAX_IOPS)] | None = None
    """Maximum reads and writes per second, of its disk and its volumes together."""
    disk_mbps: Annotated[int, msgspec.Meta(ge=1, le=MAX_MBPS)] | None = None
    """Maximum MiB per second read and written, of its disk and its volumes together."""
    failover: Failover = "never"
    """The action when its host becomes unreachable. `restart`: another host boots it again from its image, with an
    empty disk. `restore`: a host with its newest replica continues it from that, with memory and disk; without a
    replica, no host does. Both require that it has no volumes, no directories and no image that is a file. While its
    host can't reach etcd, it is paused: no VM ever runs on two hosts."""
    replicate: Replicate | None = None
    """How often other hosts receive a replica of it, a copy of its memory and its disk. Required by `failover`
    `restore`."""
    placement: Placement | None = None
    """The hosts of the fleet that may run it, also after a failover; null for any."""


class Move(msgspec.Struct, frozen=True):
    """A move of a VM from one host to another, running or completed."""

    from_host: str
    to_host: str
    at: Time
    """When the move began; for a failover, when it was completed."""
    state: Literal["moving", "moved", "taken_over", "restored"]
    """`moving`: it is paused and being copied; `moved`: it moved with memory and disk; `taken_over`: the other host was
    unreachable, so it was booted again; `restored`: the other host was unreachable, and it continued from its newest
    replica."""


MOVED, REPLICA = "moved-", "replica-"
"""Name prefixes of the snapshots from which VMs continue on another host: after a move, and after the loss of a host.
Both hosts use this name for a replica's snapshot."""


class Leaving(msgspec.Struct, frozen=True, kw_only=True):
    """The plan by which a VM continues on another host.

    In a move, the VM stays paused and does not boot until etcd decides who has it; see `docs/explanation/fleet.md`.
    With `replica`, it keeps running here, and the plan is in the copy, in case this host is lost.
    """

    id: str
    """The id of the move or of the replica, which no later one gets."""
    vm: str
    """The VM's id in the fleet (`Movable.id`) when the move began."""
    epoch: int
    """The epoch of its claim then."""
    from_host: str
    to_host: str
    at: Time
    desired: Desired
    """The desired state on the other host."""
    deciding: bool = False
    """Whether etcd may have been asked to give it to the other host. From then on only etcd knows the result."""
    replica: bool = False
    """Whether the VM stays, and only a copy leaves."""

    @property
    def snapshot(self) -> str:
        """The name of the snapshot that this host takes for a move."""
        return f"move-{self.id}"

    @property
    def arrival(self) -> str:
        """The name of that snapshot on the other host, as names are unique in the fleet."""
        return f"{REPLICA if self.replica else MOVED}{self.id}"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """The newest copies of a VM on other hosts."""

    hosts: tuple[str, ...] = ()
    """The hosts that have one."""
    at: Time | None = None
    """When it was taken; null if there is none. If its host is lost, the VM loses everything after this time."""
    reason: Reason | None = None
    """Why there is none, no newer one, or none on more hosts; null if there is no problem."""


class Movable(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a VM that another host may start when its own is unreachable."""

    id: str
    """Identifies the VM in the fleet. A new VM with the same name has another id."""
    epoch: int = 1
    """The number of hosts that it has had. Messages with an earlier epoch are ignored."""
    request: CreateVm
    """The request that created it."""
    manifest: Manifest | None = None
    """The manifest that follows from the image of the request; None for the plugin's."""
    expires_at: Time | None = None
    move: Move | None = None
    """The last move."""


class BuildTemplate(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/templates`: the members of a VM that would clone it."""

    plugin: Name = "base"
    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    """The number of CPU cores; by default the plugin's."""
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)] | None = None
    """The memory; by default the plugin's."""
    kernel_cmdline: KernelCmdline = ""
    """The kernel command line of the VMs."""
    env: Env = {}
    """The environment. It only matters with `template.after: workload`."""
    disk_mb: Annotated[int, msgspec.Meta(ge=1, le=MAX_DISK_MB)] | None = None
    """The size of the clones' disks; by default the size of the plugin's root filesystem."""
    network: Name | None = None
    """The network of the VMs: all except `none` share one template. Null for the daemon's setting."""


class VmRow(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The durable state of a VM. `decide` makes its transitions; the journal stores it, and changes what depends on
    other rows, such as leases."""

    id: int
    name: str
    project: str = DEFAULT_PROJECT
    cpu_cores: int
    memory_mb: int
    plugin: str
    runtime: str
    manifest: Manifest
    """The manifest at the VM's creation. With an OCI image, it follows from the image and the request."""
    start_workload: bool = True
    """Whether the manifest's workload starts with the VM."""
    attach: bool = False
    """Whether the workload waits in the first boot for a client that attaches to it."""
    kernel_cmdline: str = ""
    labels: dict[str, str] = {}
    env: dict[str, str] = {}
    secret_env: dict[str, str] = {}
    """The names of secrets, by the environment variables whose values they are."""
    secrets: tuple[SecretFile, ...] = ()
    """The secrets that are files."""
    registry_secret: str | None = None
    """The secret with credentials for the registry of its image, in case a boot has to fetch it; None if none is
    needed. The guest does not receive it."""
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    placement: Placement | None = None
    """The placement of the request."""
    movable: Movable | None = None
    """None unless other hosts of the fleet may start it without a request."""
    leaving: Leaving | None = None
    """None unless it moves to another host or is replicated."""
    move: Move | None = None
    """The move that brought it here, if it moved with its memory."""
    arrived: str = ""
    """The id of that move."""
    replica: Replica | None = None
    """Its copies on other hosts; None if none was made since it came here."""
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    layer: str = ""
    """The name of its copy-on-write layer over the manifest's root filesystem. No later layer gets the name, so neither
    a new nor a restored database gives a VM the disk of another. Empty if it has no layer."""
    disk_mb: int | None = None
    """The size of its disk; None for the size of the root filesystem."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network. It never changes."""
    network_reason: str = "it was created before there were networks"
    """The reason for its network."""
    network_fallback: bool = False
    """Whether the network provides less than an operator would expect."""
    lease: Lease | None = None
    """None if it has no NIC."""
    ports: tuple[PublishedPort, ...] = ()
    egress: Egress = EGRESS_ALL
    """The destinations that it may connect to."""
    volumes: tuple[VolumeMount, ...] = ()
    """Its volumes, parents before mounts inside them."""
    directories: tuple[DirectoryMount, ...] = ()
    """Its directories, parents before mounts inside them."""
    disk_iops: int | None = None
    disk_mbps: int | None = None

    desired: Desired = Desired.RUNNING
    generation: int = 1
    """The number of the desired boot. `start` and `restart` increase it."""
    grace_s: float = 10.0
    """How long the guest may take to shut down."""

    status: Status = Status.PENDING
    phase: Phase = Phase.NONE
    reason: Reason | None = None
    booted: int = 0
    """The generation of the last attempted boot."""
    boots: int = 0
    """The number of processes that were launched."""
    restarts: int = 0
    """The number of restarts by the restart policy since the last `start` by a client."""
    started_at: datetime | None = None
    image: str | None = None
    """The digest of the last boot's image."""
    template: str | None = None
    """The digest of the template, or the name of the checkpoint, that the newest boot continues from; None for a cold
    boot."""
    fallback: Reason | None = None
    """Why the last boot was cold although it began as a clone of a template."""
    balloon: bool = False
    """Whether the machine of the last boot has the device that returns freed memory to the host. A copy of it needs one
    too."""
    origin: Origin | None = None
    """The guest that it is a copy of; None if it is not a copy."""
    checkpoint: str | None = None
    """The name of the checkpoint that its first boot continues from; None once it has run."""
    disk_from: str | None = None
    """The name of the checkpoint that contains its disk after a move from another host; None once it has booted
    here."""
    tag: str = ""
    """The process tag of the last boot, committed before the launch. Empty once nothing of the process is left."""
    process: ProcessIdentity | None = None
    serial_socket: str | None = None
    """The path of the serial console's socket."""
    hypervisor: str | None = None
    accelerator: Literal["kvm", "tcg"] | None = None
    agent_seen: bool = False
    """Whether the agent of this process has answered."""
    workload: WorkloadView | None = None
    """The last reported state of this boot's workload; None if it has none, or has not reported yet. For a stopped VM:
    the state with which its workload ended, if the VM stopped with it."""
    found_boot: int = 0
    """The value of `boots` when the VM was adopted as an orphan, or 0. It is unknown what was sent to that guest."""
    revision: int = 0
    """Increased by the journal with each commit."""

    @cached_property
    def view(self) -> VmView:
        """The VM as clients see it. It is made once, as clients read a row more often than it changes."""
        return _view(self)

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.project, self.name)

    @property
    def network_key(self) -> Key:
        """The project and name of its network, if that is a named one."""
        return Key(self.project, self.network)

    @property
    def source(self) -> str:
        """The reference of its OCI image, or the name of its plugin."""
        image = self.manifest.image
        return self.plugin if image is None else image.reference

    @property
    def ip_address(self) -> str:
        """Its address; empty if it has none."""
        return self.lease.address if self.lease is not None else ""

    @property
    def is_finished(self) -> bool:
        """Whether the VM has stopped, or stops, because its workload has ended."""
        return (
            self.workload is not None
            and self.workload.has_ended
            and self.manifest.workload is not None
            and self.manifest.workload.on_exit != "keep"
        )

    @property
    def is_removed_at_rest(self) -> bool:
        """Whether the VM is deleted once it has stopped for good."""
        return self.manifest.workload is not None and self.manifest.workload.on_exit == "delete"

    @property
    def waits_for_client(self) -> bool:
        """Whether the workload waits in this boot for a client that attaches to it."""
        # A copy that was stopped before its first boot continues in a later one. Its guest waits as its origin's did.
        goes_on = self.template is not None and is_checkpoint(self.template)
        return self.attach and (self.generation == 1 or goes_on)

    @property
    def boot_key(self) -> str:
        """Identifies one boot of one VM, for instance in log positions."""
        return f"{self.id}.{self.boots}"


class ImageOfVm(msgspec.Struct, frozen=True):
    """The OCI image of a VM."""

    reference: str
    digest: str
    command: tuple[str, ...] = ()
    """The program with all arguments, including changes by the VM's request."""


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
    """The kind of the last boot; null before the first one."""
    fallback: Reason | None
    """Why the last boot was cold although it began as a clone of a template."""
    disk: Literal["none", "overlay"]
    created_at: Time
    updated_at: Time
    started_at: Time | None
    disk_mb: int | None = None
    """The requested size of the disk; null for the size of the root filesystem."""
    origin: Origin | None = None
    """The guest that it is a copy of; null if it is no copy."""
    network: str = NONE
    """`none`, `bridge`, `user`, or the name of a network."""
    network_reason: str = ""
    """The reason for its network."""
    ports: tuple[str, ...] = ()
    """The host ports that lead to its own, each as `host:host_port:guest_port/protocol`."""
    egress: Egress = EGRESS_ALL
    """The destinations that it may connect to: `none`, `all`, or the rules that allow some."""
    volumes: tuple[str, ...] = ()
    """Its volumes, each as `name:/path`, with `:ro`, `:nocopy` or `:ro,nocopy`, and its directories of the host, each
    as `/host/path:/path:ro` or `:rw`."""
    secrets: tuple[str, ...] = ()
    """The names of its secrets, as environment variables or as files."""
    disk_iops: int | None = None
    """Maximum reads and writes per second; null for no limit."""
    disk_mbps: int | None = None
    """Maximum MiB per second; null for no limit."""
    image: ImageOfVm | None = None
    """Its OCI image; null if it has none."""
    workload: WorkloadView | None = None
    """The state of its workload; null if the VM has none or does not run. A VM that has stopped with its workload
    (`on_exit`) keeps it until the next boot."""
    expires_at: Time | None = None
    """When it is deleted automatically; null if never."""
    warnings: tuple[str, ...] = ()
    """Expected features that the VM lacks, and the fixes."""
    project: str = DEFAULT_PROJECT
    failover: Failover = "never"
    """The action when its host becomes unreachable."""
    replicate: Replicate | None = None
    """How often other hosts receive a copy of it; null if never."""
    replica: Replica | None = None
    """Its newest copies on other hosts; null if it needs none."""
    move: Move | None = None
    """Its current or last move to another host; null if it never moved."""
    placement: Placement | None = None
    """The hosts of the fleet that may run it, as requested; null for any."""
    unreachable: str | None = None
    """Its host, if that is unreachable. All other members are then from its last report, and incomplete. Null if they
    are current."""


def _view(row: VmRow) -> VmView:
    return VmView(
        id=row.id,
        name=row.name,
        project=row.project,
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
        egress=row.egress,
        volumes=(*map(str, row.volumes), *map(str, row.directories)),
        secrets=secrets_of(row),
        disk_iops=row.disk_iops,
        disk_mbps=row.disk_mbps,
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
        image=_image(row),
        workload=visible_workload(row),
        expires_at=row.expires_at,
        failover="never" if row.movable is None else row.movable.request.failover,
        replicate=None if row.movable is None else row.movable.request.replicate,
        replica=shown_replica(row),
        move=_move(row),
        placement=row.placement,
    )


def shown_replica(row: VmRow) -> Replica | None:
    """Returns the VM's replicas as clients see them; None if it needs none."""
    if row.movable is None or row.movable.request.replicate is None:
        return None
    return row.replica or Replica(reason=Reason("replica_due", "no replica was made since the VM came to its host"))


def _move(row: VmRow) -> Move | None:
    if row.leaving is not None:
        return Move(row.leaving.from_host, row.leaving.to_host, row.leaving.at, "moving")
    return row.move or (None if row.movable is None else row.movable.move)


def _image(row: VmRow) -> ImageOfVm | None:
    image, workload = row.manifest.image, row.manifest.workload
    if image is None:
        return None
    return ImageOfVm(image.reference, image.digest, () if workload is None else workload.entrypoint)


def visible_workload(row: VmRow) -> WorkloadView | None:
    """Returns the workload's state as clients see it."""
    if row.manifest.workload is None or not row.start_workload:
        return None
    if row.status in (Status.RUNNING, Status.PAUSED):
        return row.workload or WorkloadView("starting")
    ends = row.status in (Status.STOPPING, Status.STOPPED, Status.DELETING)
    return row.workload if ends and row.is_finished else None


def _booted_from(row: VmRow) -> Literal["cold", "template", "snapshot", "fork"] | None:
    if not row.boots:
        return None
    if row.template is None:
        return "cold"
    if not is_checkpoint(row.template):
        return "template"
    # A VM that was moved continues from a snapshot, and is not a copy.
    return "snapshot" if row.origin is None or row.arrived else row.origin.kind
