"""Follows the state of a guest's workload, as its agent reports it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
import trio

from volant.channel import AgentClient, AgentProtocolError
from volant.model import WorkloadState, WorkloadView
from volant.model.agent import DAEMON_WATCH

from ._connection import ANSWER_S, DETAIL_CHARACTERS

_PAUSE_S = 0.1
_AT_ONCE = 5
_BURST = 20
_SUSTAINED_S = 10.0
_MAX_STATUS_BYTES = 64 * 1024


class ReportLimit:
    """The limit for the reports of one guest: each is a commit and may have events, and a guest may send any number.
    Five are allowed at once, because a program that starts and ends has three; then ten per second, at most 20 in a
    row; and then one in 10 s."""

    def __init__(self) -> None:
        self._left = float(_BURST)
        self._at = trio.current_time()

    async def pause(self) -> None:
        """Waits after a report until the next one is allowed."""
        self._refill()
        self._left -= 1
        if self._left >= _BURST - _AT_ONCE:
            return
        await trio.sleep(_PAUSE_S if self._left >= 1 else _SUSTAINED_S)
        self._refill()

    def _refill(self) -> None:
        now = trio.current_time()
        self._left = min(_BURST, self._left + (now - self._at) / _SUSTAINED_S)
        self._at = now


async def follow_workload(
    client: AgentClient, report: Callable[[WorkloadView | None], Awaitable[None]], limit: ReportLimit
) -> bool:
    """Reports the workload's state whenever it changes, until the stream ends. Returns False if the agent is too old
    for that.

    :raises AgentUnreachable:
    :raises AgentProtocolError:
    :raises ValueError: the agent sends invalid data.
    """
    async with client.stream("GET", DAEMON_WATCH, timeout_s=ANSWER_S, reserved=True) as response:
        if response.status == 404:
            return False
        if response.status != 200:
            raise AgentProtocolError(f"it answers GET {DAEMON_WATCH} with {response.status}")
        buffer = b""
        async for chunk in response:
            *lines, buffer = (buffer + chunk).split(b"\n")
            if len(buffer) > _MAX_STATUS_BYTES:
                raise AgentProtocolError("its report on the workload is too long")
            # Only the newest counts: a guest may send more than anybody wants to keep.
            if lines:
                await report(workload_of(lines[-1]))
                await limit.pause()
    return True


class _Status(msgspec.Struct):
    """A line of `DAEMON_WATCH`; see `volant.model.agent_types.WorkloadStatus`."""

    state: WorkloadState
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    error: str | None = None
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    restarts: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


def workload_of(line: bytes) -> WorkloadView | None:
    """Returns the state in a line of the agent; None if there is no workload. :raises ValueError: the line is
    invalid."""
    status = msgspec.json.decode(line, type=_Status)
    if status.state == "none":
        return None
    error = status.error
    if error is None and status.state == "failed":
        error = _how_it_ended(status)
    return WorkloadView(
        status.state,
        status.exit_code,
        None if error is None else error[:DETAIL_CHARACTERS],
        signal=status.signal,
        pid=status.pid,
        restarts=status.restarts,
    )


def _how_it_ended(status: _Status) -> str:
    if status.exit_code is not None:
        return f"it ended with exit code {status.exit_code}"
    return "it has not said why" if status.signal is None else f"it ended with signal {status.signal}"
