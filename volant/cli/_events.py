"""`volar events` and `volar vms watch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from volant.client import ClientError, OnRetry, StreamGap
from volant.model import VM_EVENTS, Problem

from ._complete import vm_names
from ._run import Pair
from ._streaming import Session, command
from ._vm_output import event_line

F = TypeVar("F", bound=Callable[..., Any])

_SAME_OUTAGE_S = 12.0
"""Attempts closer together than this belong to one outage; an attempt takes less."""

_OPTIONS = (
    click.option("--label", "labels", type=Pair(), multiple=True, help="Only VMs with this label; may be repeated."),
    click.option(
        "--type",
        "types",
        type=click.Choice([str(kind) for kind in VM_EVENTS]),
        multiple=True,
        help="Only events of this type; may be repeated.",
    ),
    click.option("--since", metavar="ID", help="Start after this event; 0 for the oldest one."),
)


def event_options(function: F) -> F:
    """Adds the options `since`, `types` and `labels` of `follow` to a command."""
    for option in _OPTIONS:
        function = option(function)
    return function


@command(None, "events")
@click.option("--vm", metavar="NAME", shell_complete=vm_names, help="Only events of this VM.")
@event_options
async def group(session: Session, /, vm: str | None, **wanted: Any) -> None:
    """Print events of VMs as they happen, until interrupted.

    If the connection is lost, volar reconnects for up to a minute and continues after the last event. If later events
    have expired in the meantime, standard error reports it, or with --json a line STREAM_GAP. Each line of --json has
    the event's id, for --since.
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
    """Prints events until interrupted."""
    out = session.out
    async with session.client.events(
        after=since, vm=vm, types=types, labels=dict(labels), on_retry=retrying(out.note)
    ) as feed:
        async for item in feed:
            if out.json:
                out.item(item)
            elif isinstance(item, StreamGap):
                out.note("volar: events are lost: the daemon does not keep those before the next one any more")
            else:
                out.line(event_line(item, sys.stdout))


def retrying(note: Callable[[str], None]) -> OnRetry:
    """Returns a callback that reports a lost connection, once for all attempts until it is restored."""
    tried_at = float("-inf")

    def report(error: ClientError | Problem, delay_s: float) -> None:
        nonlocal tried_at
        now = time.monotonic()
        if now - tried_at > _SAME_OUTAGE_S:
            note(f"volar: {error}; trying again")
        tried_at = now + delay_s

    return report
