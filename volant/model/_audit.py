"""Records of who did what, and the cause that becomes one (docs/explanation/audit.md)."""

from __future__ import annotations

import re
from contextvars import ContextVar
from datetime import datetime

import msgspec

from ._answers import LogRange
from ._caller import Caller
from ._text import Time

BEGUN = "begun"
"""The outcome of an operation that is about to start."""
DONE = "done"
REPEATED = "repeated"
"""The outcome of a request that was carried out before."""

MAX_AUDIT_TEXT = 256
"""Maximum length of each text in a record, in characters."""
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DIGITS = 8
"""Digits of a digest that a record shows: enough to tell keys apart, too few to confirm a guess."""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the audit log."""

    seq: int
    time: Time
    caller: str
    """The caller's name."""
    caller_id: str
    """An id that never changes and is unique even among callers with the same name. If it is a digest, its first
    digits."""
    address: str
    """The caller's address, or the user at a Unix socket."""
    project: str | None
    """Null if the request was for all projects."""
    operation: str
    target: str
    """The name of the object of the operation; empty for operations on the daemon."""
    vm_id: int | None
    outcome: str
    """`begun`, `done`, `repeated`, or the status and the error code: `409 vm-exists`."""
    request_id: str
    detail: str
    """Other names: a port, a file, an action, the names of copies."""


class AuditGap(msgspec.Struct, frozen=True):
    """Records with these numbers are not kept any more."""

    gap: LogRange


class Cause(msgspec.Struct, eq=False):
    """The caller, the operation and its target, for one request. Messages to the journal carry it, and records are made
    of it."""

    operation: str
    caller: Caller
    request_id: str
    project: str | None = None
    target: str = ""
    vm_id: int | None = None
    detail: str = ""
    of_vm: bool = False
    """Whether `target` is the name of a VM."""
    is_access: bool = False
    """Whether the operation reaches into a guest; its only record is then `begun`."""
    each_minute: bool = False
    """Whether repetitions by this caller within a minute get no records."""
    repeated: bool = False
    """Whether the operation was carried out before."""
    recorded: str = ""
    """The outcome of the newest durable record; empty if there is none. Only the journal writes it."""

    def record(self, seq: int, time: datetime, outcome: str, vm_id: int | None) -> AuditRecord:
        """Returns a record of the operation."""
        caller = self.caller
        return AuditRecord(
            seq=seq,
            time=time,
            caller=_cut(caller.name),
            caller_id=caller.id[:_DIGITS] if _DIGEST.match(caller.id) else _cut(caller.id),
            address=_cut(caller.address),
            project=self.project,
            operation=self.operation,
            target=_cut(self.target),
            vm_id=vm_id,
            outcome=outcome,
            request_id=self.request_id,
            detail=_cut(self.detail),
        )


def _cut(text: str) -> str:
    # The text of callers is shown in terminals and logs.
    plain = (
        text
        if text.isprintable()
        else "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    )
    return plain if len(plain) <= MAX_AUDIT_TEXT else plain[: MAX_AUDIT_TEXT - 1] + "…"


current_cause: ContextVar[Cause | None] = ContextVar("volant.cause", default=None)
"""The cause of the request that this task serves; None outside of requests and for requests that only read. The API
sets it; `ask_journal` adds it to messages."""
