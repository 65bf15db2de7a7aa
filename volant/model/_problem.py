"""Errors with a code: for clients, as the body of every error response (RFC 9457), and inside the daemon."""

from __future__ import annotations


class CodedError(Exception):
    """An error with a code.

    `code` is for programs, `message` says what happened, `hint` says what to do.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Problem(Exception):
    """An error for the client.

    Raised anywhere below the API. The API renders it as `application/problem+json`; `volar` prints `detail` and `hint`.

    `code` is a short stable word that becomes the problem's `type`. `detail` says what failed, where and why. `hint`
    says what to do. `field` names the wrong member of the body or parameter of the query. `retry_after_s` becomes the
    header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        hint: str | None = None,
        vm: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.field = field
        self.hint = hint
        self.vm = vm
        self.retry_after_s = retry_after_s


def invalid(field: str, detail: str, *, hint: str | None = None) -> Problem:
    """Returns the 400 for a wrong member of the body or parameter of the query."""
    return Problem(400, "invalid-request", detail, field=field, hint=hint)


def contradictory(field: str, detail: str, *, hint: str | None = None) -> Problem:
    """Returns the 422 for a member of a body that contradicts the others."""
    return Problem(422, "contradictory-request", detail, field=field, hint=hint)


def name_taken(name: str) -> Problem:
    """Returns the 409 for a VM name that is in use."""
    return Problem(
        409,
        "name-taken",
        f"there is a VM named {name!r} already",
        field="name",
        vm=name,
        hint="choose another name, or delete that VM first",
    )


def already_exists(kind: str, name: str, hint: str) -> Problem:
    """Returns the 409 for a name that is in use by an object other than a VM."""
    return Problem(409, f"{kind}-exists", f"there is a {kind} named {name!r} already", field="name", hint=hint)


def events_gone(after: str, oldest: str = "") -> Problem:
    """Returns the 410 for expired events. `oldest` is the oldest event that is kept, empty if it is not known here."""
    since = f"the oldest kept is {oldest}; " if oldest else ""
    return Problem(
        410,
        "events-gone",
        f"the events after {after[:80]!r} are not kept, or never were",
        hint=f"{since}list the VMs, and continue from the list's Volant-Event-Id",
    )


def no_such_plugin(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a plugin."""
    return Problem(404, "plugin-not-found", f"there is no plugin named {name[:80]!r}", field=field)


def no_such_vm(name: str) -> Problem:
    """Returns the 404 for the name of a VM."""
    return Problem(
        404,
        "vm-not-found",
        f"there is no VM named {name!r}",
        vm=name,
        hint="`volar vms list` shows what there is",
    )
