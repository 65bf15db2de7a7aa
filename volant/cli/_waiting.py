"""`volar vms wait`, and the option `--wait`: events while something happens, then what became of it."""

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
    """Wait until a VM is in one of some states."""
    wanted = list(states)

    async def waited(client: Client) -> Waited:
        return await client.vms.wait(name, wanted, timeout_s=timeout)

    return await wait_and_show(session, name, waited, " or ".join(wanted), timeout)


async def wait_and_show(
    session: Session, name: str, ask: Callable[[Client], Coroutine[Any, Any, Waited]], wanted: str, timeout_s: float
) -> int:
    """Prints the VM's events while `ask` waits, then what became of it; returns the exit code.

    :raises Failure: the VM is not in the state that is wanted
    """
    async with _telling(session, name) as teller:
        waited = await ask(session.client)
        await _settle(teller, waited)
    if waited.vm is not None:
        warn(session.out, waited.vm)
    return outcome(session.out, name, waited, wanted, timeout_s)


class _Teller:
    """Prints a VM's events."""

    def __init__(self) -> None:
        self._told: Status | None = None
        self._news = trio.Event()

    async def run(self, feed: Feed[Event | StreamGap]) -> None:
        """Until cancelled."""
        try:
            async for item in feed:
                if isinstance(item, Event):
                    sys.stderr.write(event_line(item, sys.stderr) + "\n")
                    sys.stderr.flush()
                    self._told = item.status
                    self._news.set()
                    self._news = trio.Event()
        except (ClientError, Problem):
            # It was an extra; the command itself will say what is wrong.
            return

    async def told(self, status: Status) -> None:
        """Return once the event of `status` is printed: it and the answer to our wait race each other."""
        with trio.move_on_after(1):
            while self._told != status:
                await self._news.wait()


@asynccontextmanager
async def _telling(session: Session, name: str) -> AsyncIterator[_Teller | None]:
    """Print the VM's events while the block runs; None when nobody wants them."""
    if session.out.json:
        yield None
        return
    teller = _Teller()
    async with session.client.events(vm=name) as feed, open_helpers() as helpers:
        helpers.start_soon(teller.run, feed)
        yield teller


async def _settle(teller: _Teller | None, waited: Waited) -> None:
    if teller is not None and waited.vm is not None and waited.outcome != "timeout":
        await teller.told(waited.vm.status)
