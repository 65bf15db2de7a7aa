"""What went wrong, told to people: the body of every error answer (RFC 9457)."""

from __future__ import annotations


class Problem(Exception):
    """An error that has a place on the wire.

    Raised anywhere below the API; `volant.api` turns it into `application/problem+json`, `volar` prints
    `detail` and `hint`.

    `code` is a short stable word that becomes the problem's `type`; `detail` says what, where and why;
    `hint` says what to do; `field` names the member of the body or the query parameter at fault.
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
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.field = field
        self.hint = hint
        self.vm = vm


def invalid(field: str, detail: str, *, hint: str | None = None) -> Problem:
    """400: the member `field` of a body, or the query parameter of that name, is not acceptable."""
    return Problem(400, "invalid-request", detail, field=field, hint=hint)


def contradictory(field: str, detail: str, *, hint: str | None = None) -> Problem:
    """422: each member of a body is acceptable, and `field` is not together with the others."""
    return Problem(422, "contradictory-request", detail, field=field, hint=hint)


def name_taken(name: str) -> Problem:
    """409: there is a VM of that name."""
    return Problem(
        409,
        "name-taken",
        f"there is a VM named {name!r} already",
        field="name",
        vm=name,
        hint="choose another name, or delete that VM first",
    )


def no_such_vm(name: str) -> Problem:
    """404: there is no VM of that name."""
    return Problem(
        404,
        "vm-not-found",
        f"there is no VM named {name!r}",
        vm=name,
        hint="`volar vms list` shows what there is",
    )
