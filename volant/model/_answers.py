"""The responses of the API besides VMs and events.

A client ignores members that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from ._caller import Permission, Role
from ._problem import Problem
from ._text import Time


class GuestMemory(msgspec.Struct, frozen=True):
    """A guest's memory as its kernel sees it, in MiB."""

    total_mb: int
    """Less than the VM has, as the kernel itself does not count."""
    available_mb: int
    """For programs. Includes caches that can be dropped."""


class HostMemory(msgspec.Struct, frozen=True):
    """The host's memory that a VM's hypervisor uses, in MiB: for its guest and for itself."""

    rss_mb: float
    """All resident memory."""
    pss_mb: float
    """Shared memory counts in proportion, so the sum over VMs is what they use together."""
    private_mb: float
    """Memory that is not shared."""
    shared_mb: float
    """Memory that is shared. For a clone mostly pages of its template that it has not written."""


class VmMemory(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/vms/{name}/memory`."""

    memory_mb: int
    """The memory of the VM. The host has room for all of it."""
    guest: GuestMemory | None
    """Null if the VM does not run or its agent does not answer in time."""
    host: HostMemory


class VmStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM's hypervisor has used of the host since it was started: for its guest and for itself."""

    name: str
    cpu_cores: int
    memory_mb: int
    """The memory of the VM."""
    clock_s: float
    """When this was measured, on a clock of the host that does not jump: two measurements give a rate."""
    cpu_s: float
    """Processor time."""
    rss_mb: float
    """Resident memory. Memory that clones share counts for each."""
    disk_read_bytes: int
    """Read from the host's disks; what was in its page cache does not count."""
    disk_written_bytes: int
    received_bytes: int | None
    """What the VM has received over its network interface; null if the host does not count that: there is none, or it
    is of the kind `user`."""
    sent_bytes: int | None


class Drain(msgspec.Struct, frozen=True):
    """The daemon drains: no VM starts, also after restarts of the daemon and the host."""

    since: datetime
    stop_grace_s: float | None = None
    """Running VMs are stopped with this grace, and start again afterwards. None: they go on."""


def draining(drain: Drain, *, vm: str | None = None) -> Problem:
    """Returns the 503 for a request that would start a VM."""
    return Problem(
        503,
        "draining",
        f"the daemon is draining for maintenance since {drain.since:%Y-%m-%d %H:%M:%S} UTC, so no VM can start",
        vm=vm,
        hint="`volar system undrain` ends it; running VMs go on",
    )


Wellbeing = Literal["ok", "starting", "stopping", "degraded"]
"""`ok` when the supervisor tree is whole."""


class Health(msgspec.Struct, frozen=True):
    """The answer of `GET /healthz`."""

    status: Wellbeing


class SystemStatus(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/system/status`."""

    status: Wellbeing
    vm_count: int
    vms: dict[str, int]
    """The number of VMs for each status."""
    cpu_percent: float
    """Of the whole host."""
    mem_percent: float
    """Of the whole host."""
    version: str
    uptime_s: float
    draining_since: Time | None = None
    """The start of the maintenance in effect; null: VMs may start."""


class OrphanView(msgspec.Struct, frozen=True, kw_only=True):
    """A running hypervisor of this daemon that no VM owns."""

    tag: str
    """Its process tag, which identifies it in requests."""
    pid: int
    vm_id: int
    """The id of its former VM."""
    name: str | None
    """The name of its former VM; null, as the next members, if its command line can't be read."""
    cpu_cores: int | None
    memory_mb: int | None
    adoptable: bool
    obstacle: str | None
    """Why it can't be adopted; null when it can."""


StoredKind = Literal[
    "journal", "database", "log", "disk", "snapshot", "volume", "image", "artifact", "template", "leftover", "cache"
]
PRUNED_KINDS: tuple[StoredKind, ...] = ("log", "image", "artifact", "template", "leftover")
"""What `prune` removes by default: it can be fetched or built again, or its VM is deleted."""


class StoredItem(msgspec.Struct, frozen=True):
    """Something that takes space on the host."""

    kind: StoredKind
    """`database`: one that a restore has moved aside; `leftover`: sockets or memory of a VM that is no more."""
    name: str
    """A digest for images, artifacts and templates, the VM's id for logs, else a file's name."""
    bytes: int
    used_by: list[str]
    """`VM demo`, `plugin web`, `snapshot warm`; of a template the VMs that run as its clones."""
    reclaimable: bool
    """Whether it can be removed: it has no user, and the daemon works without it."""


class Usage(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/system/df`."""

    items: list[StoredItem]
    """The largest first."""
    total_bytes: int
    reclaimable_bytes: int
    state_free_bytes: int
    """Free bytes on the disk of database, logs, disks, snapshots and templates."""
    cache_free_bytes: int
    """Free bytes on the disk of images and artifacts."""


class Kept(msgspec.Struct, frozen=True):
    """An item that could not be removed, and why."""

    kind: StoredKind
    name: str
    reason: str


class Pruned(msgspec.Struct, frozen=True):
    """The answer of `POST /api/v1/system/prune`."""

    dry_run: bool
    freed_bytes: int
    """Or what would be."""
    items: list[StoredItem]
    kept: list[Kept]


class PluginView(msgspec.Struct, frozen=True):
    """The view of a plugin that clients get."""

    name: str
    version: str
    description: str
    runtime: str
    enabled: bool
    """Whether new VMs may use it."""
    builtin: bool
    created_at: Time | None
    """None for what is built in."""
    labels: Mapping[str, str]
    project: str = "default"
    """That of the caller, for what is built in."""


class TemplateView(msgspec.Struct, frozen=True, kw_only=True):
    """The view of a template that clients get."""

    digest: str
    """Its name."""
    state: Literal["ready", "building", "waiting", "failed"]
    plugin: str
    """For whose VM it was made; VMs of others that boot from the same use it too."""
    after: Literal["agent", "workload"]
    """Whether the workload runs in it."""
    cpu_cores: int
    memory_mb: int
    disk: bool
    """Whether its guest has a root filesystem."""
    size_bytes: int
    """On the disk."""
    created_at: Time
    used_at: Time | None
    """When a VM began as a clone of it last."""
    clones: int
    """How many VMs did, since the daemon began."""
    warm: int = 0
    """Processes that wait for a VM to claim them."""
    warm_hits: int = 0
    """VMs that claimed one, since the daemon started."""
    warm_misses: int = 0
    """VMs that began as a clone while none was waiting."""
    error: str | None
    """Why there is none."""


class StreamGap(msgspec.Struct, frozen=True):
    """Events between `requested` and `oldest` are lost to this reader."""

    type: Literal["STREAM_GAP"]
    requested: str
    oldest: str
    newest: str


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a VM's log."""

    name: str
    vm_id: int
    stream: Literal["stdout", "stderr", "console"]
    line: str
    timestamp: Time
    seq: int
    """Counts for each `vm_id`, over all boots and restarts of the daemon."""
    partial: bool = False
    """The line continues in the next one of its stream."""


class LogRange(msgspec.Struct, frozen=True):
    """Both ends are included."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")


class LogGap(msgspec.Struct, frozen=True):
    """Lines with these numbers have expired and are lost to this reader."""

    gap: LogRange


class ConsoleGap(msgspec.Struct, frozen=True):
    """This reader of a console was too slow, and has lost some of the output."""

    missed: int
    """Bytes."""


class ArtifactView(msgspec.Struct, frozen=True):
    """A file in the daemon's cache from which VMs boot."""

    sha256: str
    size_bytes: int


class WantTicket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a ticket."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/[\x21-\x7e]*$", max_length=1000)] | None = None
    """The path that it opens, with those below it, such as `/ws/v1/vms/web/logs`; None: any."""


class Ticket(msgspec.Struct, frozen=True):
    """Opens one WebSocket or event stream, as the query's `ticket`."""

    ticket: str
    expires_at: Time


class SignInWithKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a session."""

    key: Annotated[str, msgspec.Meta(min_length=1, max_length=16384)]
    """An API key, or a token of the issuer."""


class NewSignInView(msgspec.Struct, frozen=True):
    """A sign-in at the issuer that has begun. The other half is the cookie beside this."""

    url: str
    """Where the browser goes on, at the issuer."""
    proof: str
    """For `POST /api/v1/session/oidc/finish`, once the browser is back."""


class FinishSignIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for the session that a sign-in at the issuer has led to."""

    proof: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    """From the beginning of the sign-in."""


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """Who a client is, and what it may do."""

    caller: str
    """As events and the audit log name it."""
    role: Role
    project: str | None
    """The one project that it sees; null: all."""
    permissions: tuple[Permission, ...]
    signed_in: bool
    """Whether it has a session, which it can end."""
    expires_at: Time | None
    """Of the session; null without one."""


class NewSessionView(SessionView, frozen=True, kw_only=True):
    """A session that has begun. The other half is the cookie beside this."""

    proof: str
    """For the header `Volant-Session`."""


class OpenPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for the origin of a port."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    """Of the guest's loopback."""
    path: Annotated[str, msgspec.Meta(pattern=r"^/[\x21-\x7e]*$", max_length=1000)] = "/"
    """What a browser opens there, with its query."""


class PortOriginView(msgspec.Struct, frozen=True):
    """A port at an origin of its own."""

    origin: str
    """Stays the same for this port of this VM."""
    url: str
    """To open in a browser, within a minute and once where keys are in force: it hands over the grant."""


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of every error answer (RFC 9457)."""

    type: str
    """`urn:volant:error:` and a stable word."""
    title: str
    status: int
    detail: str
    """What, where and why, for people."""
    error: str
    """The same as `detail`."""
    request_id: str
    """Also in the header `X-Request-Id` and in the daemon's log."""
    vm: str | None = None
    field: str | None = None
    """The member of the body, the parameter or the part of the path at fault."""
    hint: str | None = None
    """What to do."""
