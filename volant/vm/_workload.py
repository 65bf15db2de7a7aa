"""Follows the state of a guest's workload, as its agent reports it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
import trio

from volant.channel import AgentClient, AgentProtocolError
from volant.model import WorkloadView
from volant.model.agent import DAEMON_WATCH
from volant.model.agent_types import WorkloadState

from ._agent_connection import ANSWER_S, DETAIL_CHARACTERS

_PAUSE_S = 1.0
"""Each report is a commit, and a guest may change its mind as often as it likes."""
_MAX_STATUS_BYTES = 64 * 1024


async def follow_workload(client: AgentClient, report: Callable[[WorkloadView | None], Awaitable[None]]) -> bool:
    """Reports the workload's state whenever it changes, until the stream ends. False: the agent is too old for that.

    :raises AgentUnreachable: :raises AgentProtocolError: :raises ValueError: the agent sends nonsense.
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
                raise AgentProtocolError("what it says of its workload has no end")
            # Only the newest counts: a guest may send more than anybody wants to keep.
            if lines:
                await report(workload_of(lines[-1]))
                await trio.sleep(_PAUSE_S)
    return True


class _Status(msgspec.Struct):
    """A line of `DAEMON_WATCH`; see `volant.model.agent_types.WorkloadStatus`."""

    state: WorkloadState
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    error: str | None = None


def workload_of(line: bytes) -> WorkloadView | None:
    """Returns the state that a line of the agent's gives; None: there is no workload. :raises ValueError: nonsense."""
    status = msgspec.json.decode(line, type=_Status)
    if status.state == "none":
        return None
    error = status.error
    if error is None and status.state == "failed":
        how = f"signal {status.signal}" if status.exit_code is None else f"exit code {status.exit_code}"
        error = f"it ended with {how}"
    return WorkloadView(status.state, status.exit_code, None if error is None else error[:DETAIL_CHARACTERS])
