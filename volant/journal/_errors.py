"""What can go wrong between the journal and those who use it."""

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
    """A commit was meant for another revision of the row than the one that is kept.

    `row` is the row as it is now, None when there is none. Read it, decide again, commit again.
    """

    def __init__(self, vm_id: int, revision: int, row: VmRow | None) -> None:
        found = "it is gone" if row is None else f"it is at revision {row.revision}"
        super().__init__(f"VM {vm_id} was to be changed at revision {revision}, but {found}")
        self.vm_id = vm_id
        self.revision = revision
        self.row = row


class DuplicateRequest(Exception):
    """The request with this idempotency key was carried out before, with this result. Nothing was done now."""

    def __init__(self, result: Result) -> None:
        super().__init__("the request was carried out before")
        self.result = result


class DatabaseRefused(Exception):
    """The file is not a database that this version may touch: a newer version's, somebody else's, or damaged."""


class BadRow(DatabaseRefused):
    """It has a row that this daemon can't have written. The text names the table, the row and the member."""


@contextmanager
def naming(table: str, row: object) -> Iterator[None]:
    """:raises BadRow: that names the table, the row and the member; for what goes wrong in the block."""
    try:
        yield
    except BadMember as bad:
        raise BadRow(f"table {table}, row {shown(row)}: {bad}") from bad
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError) as error:
        raise BadRow(f"table {table}, row {shown(row)}, can't be understood: {error}") from error


def shown(value: object) -> str:
    """Returns the value for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class JournalBroken(Exception):
    """The database is not what the journal wrote last. The actor crashes of it, and loads again."""


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
    """The 503 for a commit that failed because of the disk; None when `error` is a bug of ours."""
    if isinstance(error, apsw.FullError):
        return full()
    if isinstance(error, _UNWRITABLE):
        return Problem(
            503,
            "journal-unwritable",
            f"the daemon's state can't be written ({error}), so nothing can be changed; running VMs go on running",
            hint="look at the disk that holds the state, then try again",
        )
    return None


def full() -> Problem:
    """503: there is no room for a change."""
    return Problem(
        503,
        "journal-full",
        "the disk that holds the daemon's state is full, so nothing can be changed; running VMs go on running",
        hint="free space on that disk and try again",
    )


def slow(deadline_s: float) -> Problem:
    """503: the disk has not confirmed a commit in time; it may still be made."""
    return Problem(
        503,
        "journal-slow",
        f"the disk that holds the daemon's state has not confirmed the change within {deadline_s:g} s; "
        "it may still be made",
        hint="read the VM again before you repeat the request",
    )


def overloaded(waiting: int) -> Problem:
    """503: more changes wait for the disk than the journal is willing to hold."""
    return Problem(503, "journal-busy", f"{waiting} changes wait for the disk already", hint="try again in a second")


def no_room(error: Exception) -> Problem:
    """503: the disk did not take a copy or a restored database."""
    full = isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT))
    return Problem(
        503,
        "no-space" if full else "state-unwritable",
        "the disk that holds the daemon's state has no room for another copy of the database"
        if full
        else f"the disk that holds the daemon's state does not take a copy of the database: {error}",
        hint="make room on that disk and try again" if full else "look at that disk, then try again",
    )


def restoring() -> Problem:
    """503: a restored database is about to be taken, and what is changed now would be lost with the old one."""
    return Problem(
        503,
        "journal-restoring",
        "a restored database is being taken; running VMs go on running",
        hint="try again in a second",
    )
