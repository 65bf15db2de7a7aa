"""`volar system`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import click

from volant.client import SystemOperations
from volant.model import PRUNED_KINDS, Pruned, StoredKind, SystemStatus, Usage

from . import _drain
from ._derived import Shown, add_commands
from ._output import styled
from ._run import Session, command
from ._shown import Sheet
from ._storage import show_pruned, show_usage
from ._system_group import group
from ._text import safe

__all__ = ["group"]

# Importing it adds its commands to the group.
del _drain


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


_SHOWN = Shown(
    {
        SystemStatus: Sheet(
            cells={"vms": lambda found: ", ".join(f"{state}: {count}" for state, count in found.vms.items() if count)}
        ),
        Usage: show_usage,
        Pruned: show_pruned,
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
