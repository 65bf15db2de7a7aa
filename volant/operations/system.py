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


@TABLE.operation("GET /api/v1/system/status", permission=Permission.VIEW, answer="Measured now")
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
    answer="Durable, over restarts of the daemon and of the host",
    errors=(503,),
    client="system.drain",
    journaled=True,
)
async def drain(
    context: Context,
    *,
    stop_vms: Annotated[
        bool, Flag(help="Stop VMs that are up, some at a time; they start again after `undrain`")
    ] = False,
    grace_s: Annotated[
        float,
        Seconds(
            name="grace", help="With `stop_vms`, for each guest: default `10s`, at most `10m`", maximum=MAX_GRACE_S
        ),
    ] = DEFAULT_GRACE_S,
) -> SystemStatus:
    """Let no VM be created or start, for maintenance.

    What would create or start a VM is 503, `urn:volant:error:draining`. Running VMs keep running. One whose restart
    policy is due, or whose host or guest has rebooted, waits. Asked again, `draining_since` stays. The answer comes
    before VMs have stopped: their events, or `GET /api/v1/vms/{name}?wait=stopped`, report that.
    """
    await context.deps.vms.drain(grace_s if stop_vms else None)
    return await system_status(context)


@TABLE.operation(
    "POST /api/v1/system/undrain",
    permission=Permission.ADMIN,
    answer="Durable",
    errors=(503,),
    client="system.undrain",
    journaled=True,
)
async def undrain(context: Context) -> SystemStatus:
    """Let VMs start again; those that waited do."""
    await context.deps.vms.undrain()
    return await system_status(context)


@TABLE.operation("GET /api/v1/system/info", permission=Permission.ADMIN, answer="Its shape is no contract")
async def system_info(context: Context) -> JsonObject:
    """Show versions, addresses, the accelerator and the reason for it."""
    return context.deps.system.info()


@TABLE.operation(
    "GET /api/v1/system/orphans",
    permission=Permission.ADMIN,
    answer="All of them",
    client="system.orphans",
)
async def list_orphans(context: Context) -> list[OrphanView]:
    """List hypervisors that run and that no VM owns.

    The daemon never touches them. Adopt one, or kill it.
    """
    return [orphan.view() for orphan in await context.deps.vms.orphans.list()]


@TABLE.operation(
    f"POST {_ORPHAN}/adopt",
    permission=Permission.ADMIN,
    status=201,
    answer="The VM, running, under its old id",
    errors=(404, 409, 503),
    client="system.adopt_orphan",
    journaled=True,
)
async def adopt_orphan(
    context: Context,
    tag: str,
    *,
    name: Annotated[str | None, Text(help="Instead of its own name", of=Name)] = None,
) -> VmCreated:
    """Make a VM of an orphaned hypervisor, in the project of the request.

    Name, size and disk are as its command line says; plugin `base`, no labels, no restart policy.
    """
    name = None if name is None else check_name(name, "name")
    return VmCreated.of(await context.deps.vms.orphans.adopt(tag, context.project, name))


@TABLE.operation(
    f"POST {_ORPHAN}/kill",
    permission=Permission.ADMIN,
    answer="Its process has ended and its files are removed",
    errors=(404, 503),
    client="system.kill_orphan",
)
async def kill_orphan(context: Context, tag: str) -> None:
    """Kill an orphaned hypervisor; its disk stays."""
    await context.deps.vms.orphans.kill(tag)


@TABLE.operation("GET /api/v1/system/tree", permission=Permission.ADMIN, answer="Its shape is no contract")
async def system_tree(context: Context) -> JsonObject:
    """Show the supervisor tree."""
    return context.deps.system.tree()


@TABLE.operation(
    "GET /api/v1/system/df",
    permission=Permission.ADMIN,
    answer="The largest first, with who uses it",
    errors=(503,),
    client="system.df",
)
async def disk_usage(context: Context) -> Usage:
    """Show what takes space on the host for the daemon."""
    with _disk():
        return await context.deps.vms.storage.usage()


@TABLE.operation(
    "POST /api/v1/system/prune",
    permission=Permission.ADMIN,
    answer="What was removed, or with `dry_run` would be",
    errors=(503,),
    client="system.prune",
    client_timeout_s=330,
)
async def prune(
    context: Context,
    *,
    dry_run: Annotated[bool, Flag(help="Say what would go, and remove nothing")] = False,
    kinds: Annotated[
        Collection[str],
        Words(
            name="kind",
            help="Only these; default `log`, `image`, `artifact`, `template`, `leftover`; `disk`, `snapshot`, "
            "`database` only when named",
            of=StoredKind,
        ),
    ] = (),
    unused_for_s: Annotated[
        float,
        Seconds(
            name="unused_for",
            help="Of templates only those from which no VM began for so long: `12h`",
            maximum=math.inf,
        ),
    ] = 0.0,
) -> Pruned:
    """Remove what nothing uses.

    What a VM, a plugin or a process uses stays, also when that begins meanwhile.
    """
    only = cast("frozenset[StoredKind]", frozenset(kinds)) or None
    with _disk():
        return await context.deps.vms.storage.prune(only, dry_run=dry_run, unused_for_s=unused_for_s)


@TABLE.operation(
    "POST /api/v1/tickets",
    permission=Permission.VIEW,
    status=201,
    answer="For one use",
    secret=True,
    client="system.ticket",
    examples={"For the log of a VM": {"path": "/ws/v1/vms/web/logs"}},
)
async def create_ticket(context: Context, *, body: WantTicket = WantTicket()) -> Ticket:  # noqa: B008 - frozen
    """Create a ticket for a browser, which can't set headers on some streams.

    With a project, the ticket is for that one, also at a path whose query is a guest's.
    """
    caller = for_ticket(context.scope, context.caller)
    if names_project(context.scope):
        caller = msgspec.structs.replace(caller, project=context.listed)
    expires_at = context.deps.host.clock.now() + timedelta(seconds=TICKET_S)
    return Ticket(context.deps.access.tickets.issue(caller.id, path=body.path, caller=caller), expires_at)


@contextmanager
def _disk() -> Iterator[None]:
    """:raises Problem: 503 instead of OSError."""
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
    "Send a file that a manifest names",
    answers={
        201: Answer(
            "It is in the cache, and stays until it is pruned, which happens to none that a plugin names", ArtifactView
        )
    },
    body=bytes,
    body_media=OCTETS,
    errors=(408, 413, 503, 507),
    details="400 `artifact-mismatch` when what comes has another SHA-256. At most `artifact_max_mb`; four at a time, "
    "for one more it is 503.",
)
TABLE.declare(
    "GET /healthz",
    "healthz",
    Permission.PUBLIC,
    "Check whether the daemon is whole",
    answers={200: Answer("It is", Health), 503: Answer("It starts, stops or is degraded", Health)},
)
TABLE.declare(
    "GET /api/v1/system/tasks",
    "system_tasks",
    Permission.ADMIN,
    "Show what every task and thread of the daemon is doing",
    answers={200: Answer("Where each one waits: for people, its shape is no contract", str, "text/plain")},
    details="Files, lines and functions, and no values. Also in the log, after `SIGUSR1`.",
)
TABLE.declare(
    "POST /api/v1/system/backup",
    "backup",
    Permission.ADMIN,
    "Take a consistent copy of all that the daemon must not lose",
    answers={
        200: Answer(
            "An SQLite database: VMs, plugins, events, stored responses; no disks, no logs",
            bytes,
            SQLITE,
            headers=("Content-Disposition", "Repr-Digest"),
        )
    },
    body=Nothing,
    errors=(409, 503),
    details="Commits and readers continue meanwhile. `Content-Length` and `Repr-Digest` show whether it came whole.",
)
TABLE.declare(
    "GET /metrics",
    "metrics",
    Permission.VIEW,
    "Get figures for Prometheus",
    answers={200: Answer("Text 0.0.4; OpenMetrics for clients that accept it", str, "text/plain")},
)
TABLE.declare(
    "GET /openapi.json",
    "openapi",
    Permission.VIEW,
    "Get this document",
    answers={200: Answer("OpenAPI 3.1", JsonObject)},
)
TABLE.declare(
    "GET /docs",
    "docs",
    Permission.PUBLIC,
    "Read this document, and try what it has; needs no network",
    answers={
        200: Answer("A page", str, "text/html", headers=("ETag",)),
        304: Answer("The client has it already", headers=("ETag",)),
    },
)
TABLE.declare(
    "GET /",
    "console",
    Permission.PUBLIC,
    "Open the console: a page that shows all of this live, and needs no network",
    answers={
        200: Answer("A page", str, "text/html", headers=("ETag",)),
        304: Answer("The client has it already", headers=("ETag",)),
    },
)
TABLE.declare(
    "GET /console/{path}",
    "console_file",
    Permission.PUBLIC,
    "Get a file of the console",
    answers={
        200: Answer("A file, which never changes under its address", bytes, ANY, headers=("ETag",)),
        304: Answer("The client has it already", headers=("ETag",)),
    },
    details="404: this daemon has another version of the console; load its page again.",
)
