"""The errors of the client, and its types that are not in `volant.model`."""

from __future__ import annotations

from typing import Literal

import msgspec

from volant.model import Problem, VmView

Command = Literal["start", "stop", "restart", "pause", "resume", "recover"]


class Waited(msgspec.Struct, frozen=True):
    """The outcome of a wait."""

    outcome: Literal["met", "failed", "timeout"]
    """`failed`: the VM ended in another state, or was deleted."""
    vm: VmView | None
    """The VM at the end of the wait; None if it no longer existed."""


class Reconnected(msgspec.Struct, frozen=True):
    """The connection to a console was lost and is restored; the guest's output in between is in the VM's log."""


class ClientProblem(Problem):
    """The daemon answered with an error; see `volant.model.Problem` for its members.

    `request_id` identifies the request in the daemon's log, or is None.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        request_id: str | None = None,
        retry_after_s: int | None = None,
        **members: str | None,
    ) -> None:
        super().__init__(status, code, detail, retry_after_s=retry_after_s, **members)
        self.request_id = request_id


class ClientError(Exception):
    """An error without a usable answer. `code` is a stable error code, `hint` says what to do, or is None."""

    code = "client-error"

    def __init__(self, detail: str, *, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


class Unreachable(ClientError):
    """No connection to the daemon could be made."""

    code = "unreachable"


class ConnectionLost(ClientError):
    """The connection broke before the answer was complete; the request may have been executed."""

    code = "connection-lost"


class DeadlineExceeded(ClientError):
    """The daemon did not answer before the deadline; the request may have been executed."""

    code = "deadline-exceeded"


class UnexpectedAnswer(ClientError):
    """The client can't interpret the answer: another program listens there, or another version of the daemon."""

    code = "unexpected-answer"
