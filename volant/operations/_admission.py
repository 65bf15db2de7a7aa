"""Admission of requests by the table of operations: permissions and audit records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from volant.http import Call, first_problem
from volant.journal import Recorder
from volant.model import Caller, Cause, Permission, Problem, current_cause

from ._context import Context
from ._table import Operation, Recorded, Table

AUTHENTICATE = "authenticate"
"""The operation in records of callers that were rejected."""
_GUESTS = ("/api/v1/vms/", "/ws/v1/vms/")


class Admission:
    """Admits requests for the operations of a table."""

    def __init__(self, table: Table, recorder: Recorder) -> None:
        self._table = table
        self._recorder = recorder

    def find(self, call: Call, path: str) -> Operation | None:
        """Returns the operation of a request by its routed path. Routes of streams also accept a final slash."""
        found = self._table.find(call.method, path) or self._table.find(call.method, path.rstrip("/"))
        return found or self._find_in_guest(path)

    def _find_in_guest(self, path: str) -> Operation | None:
        """Returns the operation for a path into a guest that documents don't show. Guests accept any method, and some
        clients append slashes or repeat `/devtools/`."""
        if path.startswith(_GUESTS):
            for other in (path, path.rstrip("/"), f"{path}/", path.replace("/devtools/devtools/", "/devtools/", 1)):
                found = self._table.find("GET", other)
                if found is not None and found.recorded is Recorded.ACCESS:
                    return found
        return None

    def cause(self, call: Call, path: str, operation: Operation | None) -> Cause | None:
        """Returns the cause of a request for its records; None if it only reads. The project is added once it is
        known."""
        if operation is None or operation.recorded is Recorded.NOT:
            return None
        assert call.caller is not None
        found = cause_of(operation, call.caller, call.request_id, call.caller.project, _target(operation, path))
        # A WebSocket is one session, however many there are in a minute.
        found.each_minute = found.each_minute and not call.is_websocket
        return found

    def rejected(self, call: Call, caller: Caller) -> Cause:
        """Returns the cause of a request whose caller is known but rejected."""
        return Cause(operation=AUTHENTICATE, caller=caller, request_id=call.request_id, each_minute=True)

    def check(self, caller: Caller, operation: Operation | None) -> None:
        """Checks the permission. :raises Problem: 403, the caller lacks the permission of an operation."""
        check_operation(caller, operation)

    async def answer(self, cause: Cause, problem: Problem | None) -> None:
        """Passes the outcome to `Recorder.answer`."""
        await self._recorder.answer(cause, problem)


def check_operation(caller: Caller, operation: Operation | None) -> None:
    """Checks the permission. :raises Problem: 403, the caller lacks the permission of an operation."""
    # A path that nothing is at is of no use to a caller with fewer permissions, and may be a bug of the table.
    permission = Permission.ADMIN if operation is None else operation.permission
    if permission is not Permission.PUBLIC and not caller.may(permission):
        what = "this path" if operation is None else f"the operation {operation.name}"
        raise Problem(
            403,
            "forbidden",
            f"{what} needs the permission {permission.value!r}, which the role {caller.role.value!r} does not have",
            hint="use a key that has it",
        )


def cause_of(operation: Operation, caller: Caller, request_id: str, project: str | None, target: str) -> Cause:
    """Returns the cause of a call of an operation."""
    return Cause(
        operation=operation.name,
        caller=caller,
        request_id=request_id,
        project=project,
        target=target,
        of_vm="/vms/{name}" in operation.path,
        is_access=operation.recorded is Recorded.ACCESS,
        each_minute=operation.each_minute,
    )


@asynccontextmanager
async def acting(context: Context, operation: Operation, target: str = "") -> AsyncIterator[None]:
    """Records an operation that the block calls, for an adapter that calls several in one request.

    :raises Problem: 403, the caller lacks its permission; 503, it can't be recorded
    """
    cause = None
    if operation.recorded is not Recorded.NOT:
        state = context.scope["state"]
        cause = cause_of(operation, context.caller, state["request_id"], context.listed, target)
    token = current_cause.set(cause)
    problem: Problem | None = None
    try:
        try:
            check_operation(context.caller, operation)
            elsewhere: Problem | None = context.scope["state"].get("elsewhere")
            if elsewhere is not None:
                # Another host should have done it, and can't be asked.
                raise elsewhere
            yield
        except* Problem as group:
            problem = first_problem(group)
        if cause is not None:
            await context.deps.recorder.answer(cause, problem)
        if problem is not None:
            raise problem
    finally:
        current_cause.reset(token)


def name_target(path: Sequence[str], body: Any) -> None:
    """Adds the target of an operation to its record: the names in its path and in its body."""
    cause = current_cause.get()
    if cause is not None:
        names = [*path, *_names(body)]
        cause.target = names[0] if names else ""
        cause.detail = ", ".join(names[1:])


async def begin(context: Context, operation: Operation) -> None:
    """Records that an operation is about to start, unless its change includes the record.

    :raises Problem: 503, it can't be recorded
    """
    if not operation.journaled:
        await context.deps.recorder.begin()


def _names(body: Any) -> list[str]:
    if isinstance(body, Mapping):
        return []
    named = [getattr(body, member, None) for member in ("name", "reference", "plugin")]
    several = getattr(body, "names", None) or ()
    return [*[one for one in named if isinstance(one, str)][:1], *several]


def _target(operation: Operation, path: str) -> str:
    """Returns the first name in a path; empty if it has none."""
    for part, given in zip(operation.path.split("/"), path.split("/"), strict=False):
        if part.startswith("{") and part != "{path}":
            return unquote(given)
    return ""
