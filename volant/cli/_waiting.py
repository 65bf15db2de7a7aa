"""`volar vms wait`, and the option `--wait`: prints events while it waits, then the outcome."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import click
import trio

from volant.client import Client, ClientError, Feed, StreamGap, Waited
from volant.concurrency import open_helpers
from volant.model import Event, Problem, Status

from ._run import States
from ._streaming import Session, command
from ._vm_output import event_line, outcome, warn
from ._vms_group import name_argument, timeout_option


@command(None, "wait")
@name_argument
@click.option(
    "--for",
    "states",
    type=States(),
    default="running",
    show_default=True,
    metavar="STATES",
    help="Comma-separated: a status, ready (the workload is healthy), or deleted.",
)
@timeout_option
async def wait_for(session: Session, name: str, states: tuple[str, ...], timeout: float) -> int:
    """Wait until a VM reaches one of some states."""
    wanted = list(states)

    async def waited(client: Client) -> Waited:
        return await client.vms.wait(name, wanted, timeout_s=timeout)

    return await wait_and_show(session, name, waited, " or ".join(wanted), timeout)


async def wait_and_show(
    session: Session, name: str, ask: Callable[[Client], Coroutine[Any, Any, Waited]], wanted: str, timeout_s: float
) -> int:
    """Prints the VM's events while `ask` waits, then the outcome; returns the exit code.

    :raises Failure: the VM is not in the wanted state
    """
    async with _printing_events(session, name) as printer:
        waited = await ask(session.client)
        await _finish(printer, waited)
    if waited.vm is not None:
        warn(session.out, waited.vm)
    return outcome(session.out, name, waited, wanted, timeout_s)


class _EventPrinter:
    """Prints a VM's events."""

    def __init__(self) -> None:
        self._printed: Status | None = None
        self._changed = trio.Event()

    async def run(self, feed: Feed[Event | StreamGap]) -> None:
        """Prints events until cancelled."""
        try:
            async for item in feed:
                if isinstance(item, Event):
                    sys.stderr.write(event_line(item, sys.stderr) + "\n")
                    sys.stderr.flush()
                    self._printed = item.status
                    self._changed.set()
                    self._changed = trio.Event()
        except (ClientError, Problem):
            # Events are an extra; the command itself will report the error.
            return

    async def until(self, status: Status) -> None:
        """Waits until the event of `status` is printed, as it may arrive after the answer to the wait."""
        with trio.move_on_after(1):
            while self._printed != status:
                await self._changed.wait()


@asynccontextmanager
async def _printing_events(session: Session, name: str) -> AsyncIterator[_EventPrinter | None]:
    """Prints the VM's events while the block runs, unless the output is JSON."""
    if session.out.json:
        yield None
        return
    printer = _EventPrinter()
    async with session.client.events(vm=name) as feed, open_helpers() as helpers:
        helpers.start_soon(printer.run, feed)
        yield printer


async def _finish(printer: _EventPrinter | None, waited: Waited) -> None:
    if printer is not None and waited.vm is not None and waited.outcome != "timeout":
        await printer.until(waited.vm.status)
