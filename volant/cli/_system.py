"""`volar system`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from volant.client import SystemOperations

from . import _drain, _storage
from ._derived import add_commands
from ._output import styled
from ._run import Session, command
from ._system_group import group
from ._text import safe, span

__all__ = ["group"]

# Importing them adds their commands to the group.
del _drain, _storage


@command(group, "status")
async def status(session: Session) -> None:
    """Show the state of the daemon, the number of VMs, and the host's load."""
    found = await session.client.system.status()
    session.out.facts(
        found,
        [
            ("status", found.status),
            ("draining", f"since {found.draining_since:%Y-%m-%d %H:%M:%S} UTC" if found.draining_since else None),
            ("version", found.version),
            ("up", span(found.uptime_s)),
            ("VMs", found.vm_count),
            *((f"  {state}", count) for state, count in found.vms.items() if count),
            ("host CPU", f"{found.cpu_percent:.0f} %"),
            ("host memory", f"{found.mem_percent:.0f} %"),
        ],
    )


@command(group, "tree")
async def tree(session: Session) -> None:
    """Show the supervisor tree."""
    found = await session.client.system.tree()
    session.out.result(found, "\n".join(_lines(found, "", "")))


@command(group, "tasks")
async def tasks(session: Session) -> None:
    """Show where every task and thread of the daemon waits, without values of variables."""
    found = await session.client.system.tasks()
    session.out.result({"tasks": found}, "\n".join(map(safe, found.splitlines())))


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


add_commands(group, "system", SystemOperations, besides=["adopt_orphan", "kill_orphan", "orphans"])
