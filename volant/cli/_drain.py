"""`volar system drain`: maintenance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._run import TIMED_OUT, Duration, Failure, Session, command
from ._system_group import group

if TYPE_CHECKING:
    from volant.client import Client

    from ._streaming import Session as Streaming

_UNDER_WAY = ("starting", "running", "paused", "stopping", "deleting")
_LOOK_S = 2.0


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
