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
"""The outcome of what is about to be done."""
DONE = "done"
REPEATED = "repeated"
"""The outcome of a request that was carried out before."""

MAX_AUDIT_TEXT = 256
"""Characters of each text of a record."""
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DIGITS = 8
"""Of a digest: enough to tell keys apart, too few to confirm a guess."""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the audit log."""

    seq: int
    time: Time
    caller: str
    """The caller's name."""
    caller_id: str
    """Never changes, and differs from those of others with the same name: the first digits where it is a digest."""
    address: str
    """An address, or the user at a Unix socket."""
    project: str | None
    """Null: the request was for all projects."""
    operation: str
    target: str
    """The name of what it is about; empty for operations on the daemon."""
    vm_id: int | None
    outcome: str
    """`begun`, `done`, `repeated`, or the status and the code of a problem: `409 vm-exists`."""
    request_id: str
    detail: str
    """What else is named: a port, a file, an action, the names of copies."""


class AuditGap(msgspec.Struct, frozen=True):
    """Records with these numbers are not kept any more."""

    gap: LogRange


class Cause(msgspec.Struct, eq=False):
    """Who does what with one request. Messages to the journal carry it, and become records."""

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
    """Whether it reaches into a guest: nothing follows `begun` then."""
    each_minute: bool = False
    """Whether further ones of this caller within a minute have no records."""
    repeated: bool = False
    """Whether the operation was carried out before."""
    recorded: str = ""
    """The outcome of its newest record that is durable; empty: there is none. Only the journal writes it."""

    def record(self, seq: int, time: datetime, outcome: str, vm_id: int | None) -> AuditRecord:
        """Returns a record of it."""
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
    # What callers have written is shown in terminals and logs.
    plain = (
        text
        if text.isprintable()
        else "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    )
    return plain if len(plain) <= MAX_AUDIT_TEXT else plain[: MAX_AUDIT_TEXT - 1] + "…"


current_cause: ContextVar[Cause | None] = ContextVar("volant.cause", default=None)
"""The cause of the request that this task serves; None outside of requests, and for those that only read. The API sets
it; `ask_journal` has messages carry it."""
