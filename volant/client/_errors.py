"""What can go wrong between a client and the daemon."""

from __future__ import annotations

from volant.model import Problem


class ClientProblem(Problem):
    """The daemon answered with an error; see `volant.model.Problem` for its members.

    `request_id` is what the daemon's log has of this request, or None.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, request_id: str | None = None, **members: str | None
    ) -> None:
        super().__init__(status, code, detail, **members)
        self.request_id = request_id


class ClientError(Exception):
    """There is no usable answer. `code` is a short stable word, `hint` says what to do."""

    code = "client-error"

    def __init__(self, detail: str, *, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


class Unreachable(ClientError):
    """No connection to the daemon could be made."""

    code = "unreachable"


class ConnectionLost(ClientError):
    """The connection broke before the answer was whole; what was asked for may have been done."""

    code = "connection-lost"


class DeadlineExceeded(ClientError):
    """The daemon took longer than it was given; what was asked for may have been done."""

    code = "deadline-exceeded"


class UnexpectedAnswer(ClientError):
    """The answer is none that this client understands: another program listens there, or another version."""

    code = "unexpected-answer"
