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
    """Less than the VM's memory, as the kernel does not count itself."""
    available_mb: int
    """Memory available to programs. Includes caches that can be dropped."""


class HostMemory(msgspec.Struct, frozen=True):
    """The host memory that a VM's hypervisor uses for its guest and for itself, in MiB."""

    rss_mb: float
    """All resident memory."""
    pss_mb: float
    """Shared memory counts in proportion, so the sum over all VMs is the memory that they use together."""
    private_mb: float
    """Memory that is not shared."""
    shared_mb: float
    """Shared memory. For a clone, mostly pages of its template that it has not written."""


class VmMemory(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/vms/{name}/memory`."""

    memory_mb: int
    """The VM's memory. The host has room for all of it."""
    guest: GuestMemory | None
    """Null if the VM does not run or its agent does not answer in time."""
    host: HostMemory


class VmStats(msgspec.Struct, frozen=True, kw_only=True):
    """The host resources that a VM's hypervisor has used since its start, for its guest and for itself."""

    name: str
    cpu_cores: int
    memory_mb: int
    """The memory of the VM."""
    clock_s: float
    """The time of the measurement on a monotonic clock of the host; two measurements give a rate."""
    cpu_s: float
    """Processor time."""
    rss_mb: float
    """Resident memory. Memory that clones share counts for each."""
    disk_read_bytes: int
    """Bytes read from the host's disks, without reads that its page cache served."""
    disk_written_bytes: int
    received_bytes: int | None
    """Bytes that the VM has received over its network interface; null if the host does not count them: without a
    network interface, or with the network `user`."""
    sent_bytes: int | None


class Drain(msgspec.Struct, frozen=True):
    """The daemon drains: no VM starts, also after restarts of the daemon and the host."""

    since: datetime
    stop_grace_s: float | None = None
    """The grace for running VMs, which are stopped and start again after the drain. None if they keep running."""


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
"""`ok` if the supervisor tree is healthy."""


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
    """CPU use of the whole host."""
    mem_percent: float
    """Memory use of the whole host."""
    version: str
    uptime_s: float
    draining_since: Time | None = None
    """The start of the current drain; null if VMs may start."""


class OrphanView(msgspec.Struct, frozen=True, kw_only=True):
    """A running hypervisor of this daemon that no VM owns."""

    tag: str
    """Its process tag, which identifies it in requests."""
    pid: int
    vm_id: int
    """The id of its former VM."""
    name: str | None
    """The name of its former VM. Null, like the next members, if its command line can't be read."""
    cpu_cores: int | None
    memory_mb: int | None
    adoptable: bool
    obstacle: str | None
    """Why it can't be adopted; null if it can."""


StoredKind = Literal[
    "journal", "database", "log", "disk", "snapshot", "volume", "image", "artifact", "template", "leftover", "cache"
]
PRUNED_KINDS: tuple[StoredKind, ...] = ("log", "image", "artifact", "template", "leftover")
"""The kinds that `prune` removes by default: they can be fetched or built again, or their VM is deleted."""


class StoredItem(msgspec.Struct, frozen=True):
    """Something that takes space on the host."""

    kind: StoredKind
    """`database`: one that a restore has moved aside; `leftover`: sockets or memory of a VM that no longer exists."""
    name: str
    """A digest for images, artifacts and templates, the VM's id for logs, otherwise a file name."""
    bytes: int
    used_by: list[str]
    """The users, such as `VM demo`, `plugin web` or `snapshot warm`; for a template, the VMs that run as its clones."""
    reclaimable: bool
    """Whether it can be removed: it has no user, and the daemon works without it."""


class Usage(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/system/df`."""

    items: list[StoredItem]
    """The items, largest first."""
    total_bytes: int
    reclaimable_bytes: int
    state_free_bytes: int
    """Free bytes on the disk with the database, logs, VM disks, snapshots and templates."""
    cache_free_bytes: int
    """Free bytes on the disk with images and artifacts."""


class Kept(msgspec.Struct, frozen=True):
    """An item that could not be removed, and why."""

    kind: StoredKind
    name: str
    reason: str


class Pruned(msgspec.Struct, frozen=True):
    """The answer of `POST /api/v1/system/prune`."""

    dry_run: bool
    freed_bytes: int
    """The bytes that were freed, or that a dry run would free."""
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
    """Null for built-in plugins."""
    labels: Mapping[str, str]
    project: str = "default"
    """The plugin's project; for a built-in plugin, the caller's."""


class TemplateView(msgspec.Struct, frozen=True, kw_only=True):
    """The view of a template that clients get."""

    digest: str
    """Identifies the template."""
    state: Literal["ready", "building", "waiting", "failed"]
    plugin: str
    """The plugin of the VM that it was made for. VMs of other plugins that boot from the same files use it too."""
    after: Literal["agent", "workload"]
    """`workload` if the workload runs in the template."""
    cpu_cores: int
    memory_mb: int
    disk: bool
    """Whether its guest has a root filesystem."""
    size_bytes: int
    """Size on disk."""
    created_at: Time
    used_at: Time | None
    """When a VM was last cloned from it."""
    clones: int
    """The number of VMs cloned from it since the daemon started."""
    warm: int = 0
    """The number of warm processes that no VM has claimed yet."""
    warm_hits: int = 0
    """The number of VMs that claimed a warm process since the daemon started."""
    warm_misses: int = 0
    """The number of VMs that were cloned while no warm process was available."""
    error: str | None
    """Why the template could not be made."""


class StreamGap(msgspec.Struct, frozen=True):
    """This reader has lost the events between `requested` and `oldest`."""

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
    """A line number that increases over all boots of a `vm_id`, and over restarts of the daemon."""
    partial: bool = False
    """The line continues in the next one of its stream."""


class LogRange(msgspec.Struct, frozen=True):
    """A range of log lines; both ends are included."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")


class LogGap(msgspec.Struct, frozen=True):
    """Log lines with these numbers have expired, and this reader can't get them."""

    gap: LogRange


class ConsoleGap(msgspec.Struct, frozen=True):
    """This reader of a console was too slow and has lost some output."""

    missed: int
    """The number of lost bytes."""


class ArtifactView(msgspec.Struct, frozen=True):
    """A file in the daemon's cache from which VMs boot."""

    sha256: str
    size_bytes: int


class WantTicket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a ticket."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/[\x21-\x7e]*$", max_length=1000)] | None = None
    """The path that the ticket opens, with all paths below it, such as `/ws/v1/vms/web/logs`; null for any path."""


class Ticket(msgspec.Struct, frozen=True):
    """A ticket that opens one WebSocket or event stream, as the query parameter `ticket`."""

    ticket: str
    expires_at: Time


class SignInWithKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for a session."""

    key: Annotated[str, msgspec.Meta(min_length=1, max_length=16384)]
    """An API key, or a token of the issuer."""


class NewSignInView(msgspec.Struct, frozen=True):
    """A started sign-in at the issuer. The response also sets the cookie that completes it."""

    url: str
    """The issuer's URL to which the browser goes next."""
    proof: str
    """The proof for `POST /api/v1/session/oidc/finish`, once the browser has returned."""


class FinishSignIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request that ends a sign-in at the issuer and begins a session."""

    proof: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    """The proof from the start of the sign-in."""


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a client and its rights."""

    caller: str
    """The caller's name, as in events and the audit log."""
    role: Role
    project: str | None
    """The only project that the client sees; null if it sees all."""
    permissions: tuple[Permission, ...]
    signed_in: bool
    """Whether the client has a session, which it can end."""
    expires_at: Time | None
    """When the session expires; null without a session."""


class NewSessionView(SessionView, frozen=True, kw_only=True):
    """A new session. The response also sets the cookie that belongs to it."""

    proof: str
    """The proof for the header `Volant-Session`."""


class OpenPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request for the origin of a port."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    """A port on the guest's loopback."""
    path: Annotated[str, msgspec.Meta(pattern=r"^/[\x21-\x7e]*$", max_length=1000)] = "/"
    """The path that a browser opens there, with its query."""


class PortOriginView(msgspec.Struct, frozen=True):
    """A port with an origin of its own."""

    origin: str
    """The origin, which stays the same for this port of this VM."""
    url: str
    """The URL to open in a browser. If keys are required, it works once and within a minute, as it carries the
    grant."""


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of every error answer (RFC 9457)."""

    type: str
    """`urn:volant:error:` and a stable error code."""
    title: str
    status: int
    detail: str
    """The failed action, the value and the reason, for people."""
    error: str
    """The same as `detail`."""
    request_id: str
    """Also in the header `X-Request-Id` and in the daemon's log."""
    vm: str | None = None
    field: str | None = None
    """The member of the body, the parameter or the part of the path that is wrong."""
    hint: str | None = None
    """A suggestion how to fix the problem."""
