"""`volar system`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import click

from volant.client import SystemOperations
from volant.model import PRUNED_KINDS, Pruned, StoredItem, StoredKind, SystemStatus, Usage

from ._derived import Shown, add_commands
from ._lazy_group import Lazy, LazyGroup
from ._output import Output, styled
from ._run import FAILED, TIMED_OUT, Duration, Failure, Session, command
from ._shown import Sheet
from ._text import safe, size

if TYPE_CHECKING:
    from volant.client import Client

    from ._streaming import Session as Streaming

_UNDER_WAY = ("starting", "running", "paused", "stopping", "deleting")
_LOOK_S = 2.0
_LAZY = {
    "backup": Lazy(
        "_backup:backup",
        "Back up the database of a running daemon to FILE: VMs, plugins, events, stored responses.",
    ),
}


@click.group(name="system", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Inspect, maintain and back up the daemon."""


@command(group, "tasks")
async def tasks(session: Session) -> None:
    """Show where every task and thread of the daemon waits, without values of variables."""
    found = await session.client.system.tasks()
    session.out.result({"tasks": found}, "\n".join(map(safe, found.splitlines())))


@command(group, "drain")
@click.option(
    "--stop-vms", is_flag=True, help="Also stop running VMs, some at a time; they start again after `undrain`."
)
@click.option(
    "--grace",
    type=Duration(),
    metavar="DURATION",
    help="With --stop-vms: how long each guest may take to shut down (10s).",
)
@click.option("--wait", is_flag=True, help="Wait until no VM runs.")
@click.option("--timeout", type=Duration(), default=600.0, metavar="DURATION", help="With --wait: maximum wait (10m).")
async def drain(session: Session, stop_vms: bool, grace: float | None, wait: bool, timeout: float) -> None:
    """Drain the host for maintenance: no VM is created or started until `undrain`.

    Running VMs keep running. The drain survives restarts of the daemon and of the host.
    """
    if grace is not None and not stop_vms:
        raise click.UsageError("--grace needs --stop-vms")
    found = await session.client.system.drain(stop_vms=stop_vms, grace_s=grace)
    if wait:
        session.stream(lambda streaming: _wait(streaming, timeout))
    session.out.result(found, "draining: no VM starts until `volar system undrain`")


async def _wait(session: Streaming, timeout_s: float) -> None:
    """Waits until no VM is running. :raises Failure: VMs are still running after `timeout_s`."""
    import trio

    up: list[str] = []
    noted = 0
    with trio.move_on_after(timeout_s):
        async with session.client.events() as feed:
            while up := await _up(session.client):
                if len(up) != noted:
                    noted = len(up)
                    session.out.note(_summary(up, 5))
                # Poll too: the end of a process after a crash is no event.
                with trio.move_on_after(_LOOK_S):
                    await feed.receive()
        return
    raise Failure(f"after {timeout_s:g} s {_summary(up, 20)}", code=TIMED_OUT)


async def _up(client: Client) -> list[str]:
    """Returns the VMs that have a process on the host, or are about to get one."""
    return [vm.name for vm in await client.vms.list() if vm.pid is not None or vm.status in _UNDER_WAY]


def _summary(names: list[str], most: int) -> str:
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"{len(names)} VM{'s are' if len(names) > 1 else ' is'} up: {shown}"


def _show_usage(out: Output, found: Usage) -> None:
    if out.json:
        out.document(found)
        return
    out.table(["KIND", "NAME", "SIZE", "USED BY"], [_row(item) for item in found.items])
    out.line(f"{size(found.total_bytes)} in all, {size(found.reclaimable_bytes)} of it unused")
    out.line(f"{size(found.state_free_bytes)} free for the state, {size(found.cache_free_bytes)} for the cache")


def _show_pruned(out: Output, done: Pruned) -> int | None:
    if out.json:
        out.document(done)
    else:
        if done.items:
            out.table(["KIND", "NAME", "SIZE", ""], [_row(item) for item in done.items])
        out.line(f"{size(done.freed_bytes)} {'would be' if done.dry_run else 'are'} freed")
        for kept in done.kept:
            out.line(f"{kept.kind} {safe(kept.name)} stays: {safe(kept.reason)}")
    return FAILED if done.kept else None


def _row(item: StoredItem) -> list[str]:
    return [item.kind, safe(item.name[:40]), size(item.bytes), safe(", ".join(item.used_by))]


def _lines(node: Mapping[str, Any], first: str, rest: str) -> Iterator[str]:
    state = str(node.get("state", ""))
    facts = [str(node.get("kind", "")), styled(safe(state), "green" if state == "running" else "yellow", sys.stdout)]
    if node.get("restarts"):
        facts.append(f"{node['restarts']} restarts")
    mailbox = node.get("mailbox")
    if isinstance(mailbox, Mapping) and mailbox.get("depth"):
        facts.append(f"{mailbox['depth']} messages waiting")
    name = styled(safe(node.get("name", "?")), None, sys.stdout, bold=True)
    yield f"{first}{name}  {'  '.join(fact for fact in facts if fact)}"
    children = node.get("children") or []
    for position, child in enumerate(children):
        last = position == len(children) - 1
        yield from _lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


_SHOWN = Shown(
    {
        SystemStatus: Sheet(
            cells={"vms": lambda found: ", ".join(f"{state}: {count}" for state, count in found.vms.items() if count)}
        ),
        Usage: _show_usage,
        Pruned: _show_pruned,
    },
    {"tree": lambda found: "\n".join(_lines(found, "", "")), "undrain": lambda _: "VMs start again"},
)
_KIND = click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(get_args(StoredKind)),
    help=f"Only this kind; may be repeated.  [default: {', '.join(PRUNED_KINDS)}]",
)
add_commands(
    group,
    "system",
    SystemOperations,
    _SHOWN,
    besides=["adopt_orphan", "kill_orphan", "orphans"],
    options={"prune": {"kinds": _KIND}},
)
