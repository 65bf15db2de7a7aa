"""Whether a caller may do what it asks for."""

from __future__ import annotations

from volant.model import Problem

from ._deps import ApiDeps
from ._permission import Permission
from ._table import Operation, Table


def check_permission(deps: ApiDeps, table: Table, caller: str | None, method: str, path: str) -> None:
    """:raises Problem: 403 the caller lacks the permission of the operation that a request is for."""
    operation = table.find(method, path)
    # A path that nothing is at is of no use to a caller with fewer permissions, and may be a bug of the table.
    _check(deps, caller, operation, Permission.ADMIN if operation is None else operation.permission)


def check_operation(deps: ApiDeps, caller: str | None, operation: Operation) -> None:
    """:raises Problem: 403 the caller lacks the permission of an operation."""
    _check(deps, caller, operation, operation.permission)


def _check(deps: ApiDeps, caller: str | None, operation: Operation | None, permission: Permission) -> None:
    if permission is not Permission.PUBLIC and not deps.allows(caller, permission):
        what = "this path" if operation is None else f"the operation {operation.name}"
        raise Problem(
            403, "forbidden", f"{what} needs the permission {permission.value!r}", hint="use a key that has it"
        )
