"""Helpers of commands that access a guest: they wait for a VM that is starting, and report its crash."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from volant.client import ClientError, ConnectionLost
from volant.model import Problem, Status

from ._run import TIMED_OUT, Failure
from ._streaming import Session
from ._text import safe

T = TypeVar("T")

START_S = 60.0
"""How long to wait for a VM that is starting, the same as for DevTools requests."""
_REPORT_S = 5.0
"""How long the daemon may take to notice a crash after the connection to the guest broke."""
_STARTING = frozenset({Status.PENDING, Status.STARTING})
_ENDED = (Status.STOPPING, Status.STOPPED, Status.CRASHED, Status.DELETING, "deleted")


async def once_running(
    session: Session, name: str, attempt: Callable[[], Awaitable[T]], timeout_s: float = START_S
) -> T:
    """Calls `attempt`; if the VM is still starting, waits until it runs and calls it again.

    :param timeout_s: how long to wait, in seconds
    :raises Failure: the VM did not run in time, can't start, or crashed during `attempt`.
    """
    try:
        return await _reporting_a_crash(session, name, attempt)
    except Problem as problem:
        if problem.code != "vm-not-running":
            raise
        vm = await session.client.vms.get(name)
        if vm.status not in _STARTING and vm.status != Status.RUNNING:
            raise
    if vm.status in _STARTING:
        session.out.note(f"volar: {name} is {vm.status}; waiting until it runs")
    waited = await session.client.vms.wait(name, timeout_s=timeout_s)
    if waited.outcome == "timeout":
        raise Failure(
            f"VM {name!r} does not run after {timeout_s:g} s",
            code=TIMED_OUT,
            hint=f"`volar vms wait {name}` waits longer, `volar vms logs {name}` shows what it is doing",
        )
    if waited.outcome == "failed":
        why = f": {waited.vm.reason.message}" if waited.vm is not None and waited.vm.reason is not None else ""
        state = waited.vm.status if waited.vm is not None else "deleted"
        raise Failure(f"VM {name!r} is {state}{why}", hint=f"`volar vms logs {name}` shows its console")
    return await _reporting_a_crash(session, name, attempt)


async def _reporting_a_crash(session: Session, name: str, attempt: Callable[[], Awaitable[T]]) -> T:
    try:
        return await attempt()
    except (ConnectionLost, Problem) as error:
        # A guest that ends before it has answered anything is a 502.
        if isinstance(error, Problem) and error.code != "agent-unreachable":
            raise
        ended = await _how_it_ended(session, name)
        if ended is None:
            raise
        raise Failure(ended, hint=f"`volar vms logs {name}` shows its console") from None


async def _how_it_ended(session: Session, name: str) -> str | None:
    """Returns how the VM ended; None if it is running or its state can't be read, so that only the connection broke."""
    try:
        waited = await session.client.vms.wait(name, _ENDED, timeout_s=_REPORT_S)
    except (ClientError, Problem):
        return None
    if waited.outcome == "timeout":
        return None
    if waited.vm is None:
        return f"VM {name!r} was deleted meanwhile"
    why = f": {waited.vm.reason.message}" if waited.vm.reason is not None else ""
    verb = "crashed" if waited.vm.status == Status.CRASHED else f"is {waited.vm.status}"
    return safe(f"VM {name!r} {verb}{why}")
