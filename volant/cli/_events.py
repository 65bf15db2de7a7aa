"""`volar events` and `volar vms watch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from volant.client import ClientError, OnRetry, StreamGap
from volant.model import EventType, Problem

from ._complete import vm_names
from ._run import Pair
from ._streaming import Session, command
from ._vm_output import event_line

F = TypeVar("F", bound=Callable[..., Any])

_SAME_OUTAGE_S = 12.0
"""Longer than an attempt takes."""

_OPTIONS = (
    click.option("--label", "labels", type=Pair(), multiple=True, help="Only VMs with this label; may be repeated."),
    click.option(
        "--type", "types", type=click.Choice([str(kind) for kind in EventType]), multiple=True, help="Only these."
    ),
    click.option("--since", metavar="ID", help="Start after this event; 0: with the oldest one kept."),
)


def event_options(function: F) -> F:
    """Gives a command the options `since`, `types` and `labels` of `follow`."""
    for option in _OPTIONS:
        function = option(function)
    return function


@command(None, "events")
@click.option("--vm", metavar="NAME", shell_complete=vm_names, help="Only of this VM.")
@event_options
async def group(session: Session, /, vm: str | None, **wanted: Any) -> None:
    """Print events of VMs as they happen, until interrupted.

    A connection that is lost is made again, for up to a minute, and goes on after the last event that was seen; where
    the daemon does not keep what came after that, standard error says so, or with --json a line STREAM_GAP. Each line
    of --json has its event's id, for --since.
    """
    await follow(session, vm, **wanted)


@command(None, "watch")
@click.argument("name", required=False, shell_complete=vm_names)
@event_options
async def watch(session: Session, /, name: str | None, **wanted: Any) -> None:
    """Print the events of all VMs, or of one, until interrupted; `volar events` has more options."""
    await follow(session, name, **wanted)


async def follow(
    session: Session,
    vm: str | None,
    since: str | None,
    types: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
) -> None:
    """Print events until interrupted."""
    out = session.out
    async with session.client.events(
        after=since, vm=vm, types=types, labels=dict(labels), on_retry=retrying(out.note)
    ) as feed:
        async for item in feed:
            if out.json:
                out.item(item)
            elif isinstance(item, StreamGap):
                out.note("volar: events are lost: the daemon does not keep what came before the next one")
            else:
                out.line(event_line(item, sys.stdout))


def retrying(note: Callable[[str], None]) -> OnRetry:
    """Notes that a connection was lost, once for all that is tried until it is there again."""
    tried_at = float("-inf")

    def tell(error: ClientError | Problem, delay_s: float) -> None:
        nonlocal tried_at
        now = time.monotonic()
        if now - tried_at > _SAME_OUTAGE_S:
            note(f"volar: {error}; trying again")
        tried_at = now + delay_s

    return tell
