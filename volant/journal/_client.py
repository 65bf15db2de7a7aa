"""The journal's interface for the rest of the daemon: changes, and audit records of actions that change nothing in the
journal."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Protocol, TypeVar

import msgspec
import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.model import BEGUN, DONE, MAX_AUDIT_TEXT, REPEATED, Cause, Problem, current_cause

from ._journal import Journal
from ._store import Store
from .messages import WriteRecord

_log = logging.getLogger("volant.audit")

_MALFORMED = frozenset({400, 405, 406, 408, 411, 413, 414, 415, 426, 431})
"""The statuses of unreadable requests, for which no action was tried."""
_EVERY_S = 60.0
_MOST_PLACES = 10_000


class _Place(msgspec.Struct, eq=False):
    """One target of one caller, which gets one record a minute."""

    began: float
    done: trio.Event
    recorded: bool = False


class Recorder:
    """Writes a record before an action, and another one before its answer."""

    def __init__(self, journal: Ref[Journal], store: Store) -> None:
        self._journal = journal
        self._store = store
        self._places: OrderedDict[tuple[object, ...], _Place] = OrderedDict()

    async def begin(self, vm_id: int | None = None, detail: str = "") -> None:
        """Records that the operation of this task's request is about to be done. Nothing is written for what needs no
        record, or has one.

        :param vm_id: the VM that it reaches into
        :param detail: see `AuditRecord`
        :raises Problem: 503 the record can't be written: it must not be done.
        """
        cause = current_cause.get()
        if cause is None or cause.recorded:
            return
        cause.vm_id = vm_id if vm_id is not None else cause.vm_id
        cause.detail = detail or cause.detail
        await self._write(cause, BEGUN)

    async def answer(self, cause: Cause, problem: Problem | None) -> None:
        """Records how an operation ends, unless that is recorded. `problem`: the refusal, None if there is none.

        :raises Problem: 503 there would be no record of it: it must not be answered.
        """
        if problem is None:
            if cause.recorded == DONE or (cause.recorded and cause.is_access):
                return
            outcome = REPEATED if cause.repeated else DONE
        elif cause.recorded or problem.status not in _MALFORMED:
            outcome = f"{problem.status} {problem.code}"
        else:
            return
        try:
            await self._write(cause, outcome)
        except Problem as trouble:
            if problem is None and not cause.recorded:
                raise
            self._store.figures.lost_records += 1
            _log.warning(
                "%s %s %s: %s, which could not be recorded: %s",
                cause.caller.name, cause.operation, cause.target, outcome, trouble.detail,
                extra={"request_id": cause.request_id},
            )  # fmt: skip

    async def _write(self, cause: Cause, outcome: str) -> None:
        if cause.each_minute:
            await self._once_a_minute(cause, outcome)
        else:
            await ask_journal(self._journal, WriteRecord(cause, outcome))

    async def _once_a_minute(self, cause: Cause, outcome: str) -> None:
        caller = cause.caller
        detail = (cause.detail or cause.operation)[:MAX_AUDIT_TEXT]
        where = (cause.project, cause.target[:MAX_AUDIT_TEXT], cause.vm_id, detail)
        key = (caller.id, caller.address, *where, outcome)
        while True:
            place = self._places.get(key)
            if place is None or trio.current_time() - place.began >= _EVERY_S:
                break
            if not place.done.is_set():
                await place.done.wait()
            elif place.recorded:
                cause.recorded = outcome
                return
            else:
                break
        place = self._places[key] = _Place(trio.current_time(), trio.Event())
        self._places.move_to_end(key)
        if len(self._places) > _MOST_PLACES:
            self._places.popitem(last=False)
        try:
            await ask_journal(self._journal, WriteRecord(cause, outcome))
            place.recorded = True
        finally:
            place.done.set()


R = TypeVar("R")


class JournalRef(Protocol):
    """Takes messages to the journal: the reference to its actor, or in a fleet the object that has the other hosts
    agree before."""

    async def ask(self, message: Request[R], /, *, timeout_s: float) -> R:
        """Returns the journal's answer."""


async def ask_journal(journal: JournalRef, message: Request[R], timeout_s: float = 60.0) -> R:
    """Returns the journal's answer. The message carries the cause of the request that this task serves.

    :raises Problem: the journal refuses; 503 `journal-down` it does not answer, and may have made the change or not.
    """
    cause = current_cause.get()
    if cause is not None and getattr(message, "cause", cause) is None:
        message = msgspec.structs.replace(message, cause=cause)  # type: ignore[type-var]
    try:
        return await journal.ask(message, timeout_s=timeout_s)
    except (ActorDown, AskTimeout) as error:
        raise journal_down(error) from error


def journal_down(error: Exception) -> Problem:
    """Returns the problem for a change that the journal did not confirm."""
    return Problem(
        503, "journal-down", f"the journal did not confirm the change: {error}",
        hint="check whether the change was made, then retry; the daemon's log says why the journal fails",
    )  # fmt: skip
