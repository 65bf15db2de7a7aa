"""The daemon itself: figures, maintenance, orphaned hypervisors, disk space, tickets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, cast

import msgspec

from volant import __version__
from volant.http import TICKET_S, Nothing, for_ticket, names_project
from volant.journal import VmCreated
from volant.model import (
    ArtifactView,
    Health,
    Name,
    OrphanView,
    Permission,
    Problem,
    Pruned,
    Status,
    StoredKind,
    SystemStatus,
    Ticket,
    Usage,
    WantTicket,
    check_name,
)
from volant.model.agent import DEFAULT_GRACE_S, MAX_GRACE_S

from ._context import Context
from ._parameters import Flag, Seconds, Text, Words
from ._table import ANY, OCTETS, SQLITE, TABLE, Answer, JsonObject

_ORPHAN = "/api/v1/system/orphans/{tag}"


@TABLE.operation("GET /api/v1/system/status", permission=Permission.VIEW, answer="The current figures")
async def system_status(context: Context) -> SystemStatus:
    """Show figures of the daemon and its host."""
    deps = context.deps
    rows = deps.store.projection.rows()
    states = Counter(row.status for row in rows)
    figures = deps.host.machine.figures()
    used = figures.memory_total_mb - figures.memory_available_mb
    drain = deps.store.projection.drain
    return SystemStatus(
        status=deps.system.health(),
        vm_count=len(rows),
        vms={state.value: states[state] for state in Status},
        cpu_percent=figures.cpu_percent,
        mem_percent=round(100.0 * used / max(1, figures.memory_total_mb), 1),
        version=__version__,
        uptime_s=round((deps.host.clock.now() - deps.system.started_at).total_seconds(), 3),
        draining_since=None if drain is None else drain.since,
    )


@TABLE.operation(
    "POST /api/v1/system/drain",
    permission=Permission.ADMIN,
    answer="The daemon drains, also after restarts of the daemon and the host",
    errors=(503,),
    client="system.drain",
    journaled=True,
)
async def drain(
    context: Context,
    *,
    stop_vms: Annotated[bool, Flag(help="Stop running VMs, some at a time; they start again after `undrain`")] = False,
    grace_s: Annotated[
        float,
        Seconds(
            name="grace",
            help="With `stop_vms`: how long each guest may take to shut down; default `10s`, at most `10m`",
            maximum=MAX_GRACE_S,
        ),
    ] = DEFAULT_GRACE_S,
) -> SystemStatus:
    """Prevent VMs from being created or started, for maintenance.

    Requests that would create or start a VM get 503, `urn:volant:error:draining`. Running VMs keep running. A VM waits
    if its restart policy is due, or if its host or guest has rebooted. Another drain keeps `draining_since`. The
    request returns before VMs have stopped: their events, or `GET /api/v1/vms/{name}?wait=stopped`, report that.
    """
    await context.deps.vms.drain(grace_s if stop_vms else None)
    return await system_status(context)


@TABLE.operation(
    "POST /api/v1/system/undrain",
    permission=Permission.ADMIN,
    answer="VMs may start",
    errors=(503,),
    client="system.undrain",
    journaled=True,
)
async def undrain(context: Context) -> SystemStatus:
    """Allow VMs to start again; waiting VMs boot now."""
    await context.deps.vms.undrain()
    return await system_status(context)


@TABLE.operation("GET /api/v1/system/info", permission=Permission.ADMIN, answer="Details; the format may change")
async def system_info(context: Context) -> JsonObject:
    """Show versions, addresses, and the accelerator with the reason for its choice."""
    return context.deps.system.info()


@TABLE.operation(
    "GET /api/v1/system/orphans",
    permission=Permission.ADMIN,
    answer="The orphaned hypervisors",
    client="system.orphans",
)
async def list_orphans(context: Context) -> list[OrphanView]:
    """List running hypervisors that no VM owns.

    The daemon never touches them. Adopt or kill them.
    """
    return [orphan.view() for orphan in await context.deps.vms.orphans.list()]


@TABLE.operation(
    f"POST {_ORPHAN}/adopt",
    permission=Permission.ADMIN,
    status=201,
    answer="The VM, running, with its old id",
    errors=(404, 409, 503),
    client="system.adopt_orphan",
    journaled=True,
)
async def adopt_orphan(
    context: Context,
    tag: str,
    *,
    name: Annotated[str | None, Text(help="A name for the VM instead of its former one", of=Name)] = None,
) -> VmCreated:
    """Make a VM from an orphaned hypervisor, in the project of the request.

    Name, size and disk come from its command line; it has the plugin `base`, no labels and no restart policy.
    """
    name = None if name is None else check_name(name, "name")
    return VmCreated.of(await context.deps.vms.orphans.adopt(tag, context.project, name))


@TABLE.operation(
    f"POST {_ORPHAN}/kill",
    permission=Permission.ADMIN,
    answer="Its process is killed and its files are removed",
    errors=(404, 503),
    client="system.kill_orphan",
)
async def kill_orphan(context: Context, tag: str) -> None:
    """Kill an orphaned hypervisor; its disk stays."""
    await context.deps.vms.orphans.kill(tag)


@TABLE.operation("GET /api/v1/system/tree", permission=Permission.ADMIN, answer="The tree; the format may change")
async def system_tree(context: Context) -> JsonObject:
    """Show the supervisor tree."""
    return context.deps.system.tree()


@TABLE.operation(
    "GET /api/v1/system/df",
    permission=Permission.ADMIN,
    answer="The items with their users, largest first",
    errors=(503,),
    client="system.df",
)
async def disk_usage(context: Context) -> Usage:
    """Show disk usage with its users, and how much a prune can free."""
    with _disk():
        return await context.deps.vms.storage.usage()


@TABLE.operation(
    "POST /api/v1/system/prune",
    permission=Permission.ADMIN,
    answer="The removed items; with `dry_run`, the items that would be removed",
    errors=(503,),
    client="system.prune",
    client_timeout_s=330,
)
async def prune(
    context: Context,
    *,
    dry_run: Annotated[bool, Flag(help="Report what would be removed, without removing it")] = False,
    kinds: Annotated[
        Collection[str],
        Words(
            name="kind",
            help="Kinds to remove; default `log`, `image`, `artifact`, `template`, `leftover`; `disk`, `snapshot` and "
            "`database` only if listed",
            of=StoredKind,
        ),
    ] = (),
    unused_for_s: Annotated[
        float,
        Seconds(
            name="unused_for",
            help="Only templates from which no VM was cloned for this time: `12h`",
            maximum=math.inf,
        ),
    ] = 0.0,
) -> Pruned:
    """Remove unused files.

    Files that a VM, a plugin, a snapshot or a process uses are kept, also if the use begins meanwhile. Disks without a
    VM, snapshots that are not in the database, and databases that a restore has replaced are removed only if you name
    their kind.
    """
    only = cast("frozenset[StoredKind]", frozenset(kinds)) or None
    with _disk():
        return await context.deps.vms.storage.prune(only, dry_run=dry_run, unused_for_s=unused_for_s)


@TABLE.operation(
    "POST /api/v1/tickets",
    permission=Permission.VIEW,
    status=201,
    answer="The ticket, for one use",
    secret=True,
    client="system.ticket",
    examples={"For the log of a VM": {"path": "/ws/v1/vms/web/logs"}},
)
async def create_ticket(context: Context, *, body: WantTicket = WantTicket()) -> Ticket:  # noqa: B008 - frozen
    """Create a ticket for a browser, which can't set headers on some streams.

    If the request names a project, the ticket is for that project, also for a path whose query belongs to a guest.
    """
    caller = for_ticket(context.scope, context.caller)
    if names_project(context.scope):
        caller = msgspec.structs.replace(caller, project=context.listed)
    expires_at = context.deps.host.clock.now() + timedelta(seconds=TICKET_S)
    return Ticket(context.deps.access.tickets.issue(caller.id, path=body.path, caller=caller), expires_at)


@contextmanager
def _disk() -> Iterator[None]:
    """Converts OSError. :raises Problem: 503."""
    try:
        yield
    except OSError as error:
        raise Problem(
            503, "disk-unreadable", f"the daemon can't read its directories: {error}", hint="check the disk"
        ) from error


TABLE.declare(
    "PUT /api/v1/artifacts/{sha256}",
    "put_artifact",
    Permission.CONTROL,
    "Upload a file for a manifest",
    answers={
        201: Answer(
            "The file in the cache. It is kept until it is pruned, and never pruned while a plugin names it",
            ArtifactView,
        )
    },
    body=bytes,
    body_media=OCTETS,
    errors=(408, 413, 503, 507),
    details="400 `artifact-mismatch` if the data has another SHA-256. The maximum size is `artifact_max_mb`. More than "
    "four uploads at a time get 503.",
)
TABLE.declare(
    "GET /healthz",
    "healthz",
    Permission.PUBLIC,
    "Check the daemon's health",
    answers={200: Answer("Healthy", Health), 503: Answer("Starting, stopping or degraded", Health)},
)
TABLE.declare(
    "GET /api/v1/system/tasks",
    "system_tasks",
    Permission.ADMIN,
    "Show what every task and thread of the daemon is doing",
    answers={200: Answer("The position of each task and thread, for people; the format may change", str, "text/plain")},
    details="Contains files, lines and functions, but no values. `SIGUSR1` writes it to the log.",
)
TABLE.declare(
    "POST /api/v1/system/backup",
    "backup",
    Permission.ADMIN,
    "Make a consistent backup of the daemon's state",
    answers={
        200: Answer(
            "An SQLite database with VMs, plugins, events and stored responses, but no disks and no logs",
            bytes,
            SQLITE,
            headers=("Content-Disposition", "Repr-Digest"),
        )
    },
    body=Nothing,
    errors=(409, 503),
    details="Reads and writes continue meanwhile. Check the copy with `Content-Length` and `Repr-Digest`.",
)
TABLE.declare(
    "GET /metrics",
    "metrics",
    Permission.VIEW,
    "Get metrics for Prometheus",
    answers={200: Answer("Metrics in text format 0.0.4, or OpenMetrics for clients that accept it", str, "text/plain")},
)
TABLE.declare(
    "GET /openapi.json",
    "openapi",
    Permission.VIEW,
    "Get this document",
    answers={200: Answer("The document, OpenAPI 3.1", JsonObject)},
)
TABLE.declare(
    "GET /docs",
    "docs",
    Permission.PUBLIC,
    "Browse this document and try its operations; needs no internet access",
    answers={
        200: Answer("A page", str, "text/html", headers=("ETag",)),
        304: Answer("The client's copy is current", headers=("ETag",)),
    },
)
TABLE.declare(
    "GET /",
    "console",
    Permission.PUBLIC,
    "Open the web console; needs no internet access",
    answers={
        200: Answer("A page", str, "text/html", headers=("ETag",)),
        304: Answer("The client's copy is current", headers=("ETag",)),
    },
)
TABLE.declare(
    "GET /console/{path}",
    "console_file",
    Permission.PUBLIC,
    "Get a file of the console",
    answers={
        200: Answer("A file that never changes at this path", bytes, ANY, headers=("ETag",)),
        304: Answer("The client's copy is current", headers=("ETag",)),
    },
    details="404 if this daemon has another version of the console; reload its page.",
)
