"""`volar hosts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from volant.client import ClientProblem, ConnectionLost, DeadlineExceeded, HostsOperations, Unreachable
from volant.model import HostView

from ._complete import NAMES
from ._derived import Shown, add_commands
from ._lazy_group import LazyGroup
from ._run import TIMED_OUT, UNREACHABLE, Duration, Failure, Session, command
from ._shown import Sheet
from ._text import safe

if TYPE_CHECKING:
    from volant.model import HostMoves, MoveView

    from ._streaming import Session as Streaming

_LOOK_S = 0.5
_SILENT_S = 60.0
"""How long a draining host may not answer: its daemon, or the daemon that volar asks, may be restarting."""


@click.group(name="hosts", cls=LazyGroup)
def group() -> None:
    """Manage the hosts of a fleet."""


@command(group, "drain")
@click.argument("name", shell_complete=NAMES.get("hosts"))
@click.option("--keep-vms", is_flag=True, help="Keep its VMs running on it.")
@click.option("--no-wait", is_flag=True, help="Return at once; the drain continues in the background.")
@click.option("--timeout", type=Duration(), default=3600.0, metavar="DURATION", help="Maximum wait (1h).")
async def drain(session: Session, name: str, keep_vms: bool, no_wait: bool, timeout: float) -> None:
    """Give a host no new VMs, and move its VMs to other hosts, until `undrain`.

    Each VM is paused while it is copied, two at a time, and continues with memory and disk. The command waits until all
    VMs that can move have moved. If some stay, it prints why, and the exit code is 1. It keeps waiting while daemons
    restart, for up to a minute without an answer. The drain continues if you don't wait for it; run the command again
    to see its progress.
    """
    found = await session.client.hosts.drain(name, keep_vms=keep_vms)
    if keep_vms or no_wait:
        session.out.result(found, f"host {safe(name)} is draining")
        return
    session.stream(lambda streaming: _wait(streaming, name, timeout))
    session.out.result(found, f"host {safe(name)} is draining, and has no VMs")


async def _wait(session: Streaming, name: str, timeout_s: float) -> None:
    """Waits until a host has no VMs left. :raises Failure: some stay, some still move, or the host does not answer."""
    import trio

    shown: dict[tuple[str, str], str] = {}
    was_drained = False
    with trio.move_on_after(timeout_s):
        while True:
            found = await _moves(session, name)
            for move in found.moves:
                text, key = _text_of(move), (move.project, move.vm)
                if shown.get(key) != text:
                    shown[key] = text
                    session.out.note(text)
            there = {(move.project, move.vm) for move in found.moves}
            for key in [key for key in shown if key not in there]:
                del shown[key]
                # Or somebody has deleted it.
                session.out.note(f"{safe(key[1])}: has left {safe(name)}")
            if was_drained and found.since is None:
                raise Failure(f"{safe(name)} is not drained any more")
            was_drained = found.since is not None
            # A host that has not noticed its drain yet moves no VMs.
            if found.since is not None and all(move.state == "stays" for move in found.moves):
                break
            await trio.sleep(_LOOK_S)
        if found.moves:
            raise Failure(f"{safe(name)} is draining, and keeps {len(found.moves)} of its VMs")
        return
    raise Failure(f"after {timeout_s:g} s {safe(name)} still moves VMs; the drain continues", code=TIMED_OUT)


async def _moves(session: Streaming, name: str) -> HostMoves:
    """Returns the moves of a host's VMs. :raises Failure: the host has not answered for a minute."""
    import trio

    from volant.client._feed import is_passing

    asked_at, is_noted = trio.current_time(), False
    while True:
        error: ClientProblem | Unreachable | ConnectionLost | DeadlineExceeded
        try:
            return await session.client.hosts.moves(name)
        except ClientProblem as problem:
            if not is_passing(problem):
                raise
            error = problem
        except (Unreachable, ConnectionLost, DeadlineExceeded) as failure:
            error = failure
        if trio.current_time() - asked_at > _SILENT_S:
            hint = f"the moves go on; run 'volar hosts drain {safe(name)}' again to see how far they are"
            text = f"no answer about the VMs of {safe(name)} for {_SILENT_S:g} s: {error.detail}"
            raise Failure(text, code=UNREACHABLE, hint=hint)
        if not is_noted:
            session.out.note(f"no answer about the VMs of {safe(name)}, whose moves go on: {error.detail}")
            is_noted = True
        await trio.sleep(_LOOK_S)


def _text_of(move: MoveView) -> str:
    to_host = "" if move.to_host is None else f" to {safe(move.to_host)}"
    share = f", {100 * move.done_bytes // move.total_bytes} %" if move.state == "copying" and move.total_bytes else ""
    reason = "" if move.reason is None else f": {safe(move.reason)}"
    return f"{safe(move.vm)}: {move.state}{to_host}{share}{reason}"


_SHEET = Sheet(
    ("name", "state", "zone", "vms", "cpus", "free_memory_mb", "address"),
    cells={
        "state": lambda host: host.state if host.draining_since is None else f"{host.state}, draining",
        "cpus": lambda host: f"{host.used_cpu_cores}/{host.cpu_cores}",
    },
)
_SHOWN = Shown({HostView: _SHEET}, {"undrain": "host {name} gets new VMs again"})
add_commands(group, "hosts", HostsOperations, _SHOWN)
