"""Errors of the journal, and the problems that clients get for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC

import apsw
import msgspec

from volant.model import Problem, VmRow
from volant.model.stored import BadMember

from ._results import Result


class StaleRow(Exception):
    """A commit names another revision than the row has. `row` is the row as it is now, None when it is gone.

    Read it, decide again, commit again.
    """

    def __init__(self, vm_id: int, revision: int, row: VmRow | None) -> None:
        found = "it is gone" if row is None else f"it is at revision {row.revision}"
        super().__init__(f"a commit is for VM {vm_id} at revision {revision}, but {found}")
        self.vm_id = vm_id
        self.revision = revision
        self.row = row


class DuplicateRequest(Exception):
    """The request with this idempotency key was carried out before, with this result. Nothing was done now."""

    def __init__(self, result: Result) -> None:
        super().__init__("the request was carried out before")
        self.result = result


class DatabaseRefused(Exception):
    """This version must not use the file: it is damaged, or a newer version or another program wrote it."""


class BadRow(DatabaseRefused):
    """The database has a row that volantd can't have written. The text names table, row and member."""


@contextmanager
def naming(table: str, row: object) -> Iterator[None]:
    """Converts errors of the block. :raises BadRow: names the table, the row and the member."""
    try:
        yield
    except BadMember as bad:
        raise BadRow(f"table {table}, row {shown(row)}: {bad}") from bad
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError) as error:
        raise BadRow(f"table {table}, row {shown(row)}, can't be read: {error}") from error


def shown(value: object) -> str:
    """Returns the value for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class JournalBroken(Exception):
    """The database is not what the journal wrote last. The actor crashes, and loads again."""


_UNWRITABLE = (
    apsw.FullError,
    apsw.IOError,
    apsw.BusyError,
    apsw.LockedError,
    apsw.ReadOnlyError,
    apsw.CantOpenError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.NoMemError,
    apsw.ProtocolError,
)


def unwritable(error: BaseException) -> Problem | None:
    """Returns the 503 for a commit that failed because of the disk; None when `error` is a bug."""
    if isinstance(error, apsw.FullError):
        return full()
    if isinstance(error, _UNWRITABLE):
        return Problem(
            503,
            "journal-unwritable",
            f"the daemon's state can't be written ({error}), so changes are refused; VMs go on running",
            hint="check the disk that holds the state, then retry",
        )
    return None


def full() -> Problem:
    """Returns the 503 for a change that the disk has no space for."""
    return Problem(
        503,
        "journal-full",
        "the disk that holds the daemon's state is full, so changes are refused; VMs go on running",
        hint="free space on that disk, then retry",
    )


def slow(deadline_s: float) -> Problem:
    """Returns the 503 for a commit that the disk has not confirmed in time. It may still be made."""
    return Problem(
        503,
        "journal-slow",
        f"the disk that holds the daemon's state has not confirmed the change within {deadline_s:g} s; "
        "it may still be made",
        hint="check the VM before you retry",
    )


def overloaded(waiting: int) -> Problem:
    """Returns the 503 for a change when too many wait already."""
    return Problem(503, "journal-busy", f"{waiting} changes are waiting for the disk", hint="retry in a second")


def no_room(error: Exception) -> Problem:
    """Returns the 503 for a copy or a restored database that the disk did not take."""
    full = isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT))
    return Problem(
        503,
        "no-space" if full else "state-unwritable",
        "the disk that holds the daemon's state has no room for another copy of the database"
        if full
        else f"a copy of the database can't be written to the disk that holds the daemon's state: {error}",
        hint="free space on that disk, then retry" if full else "check that disk, then retry",
    )
