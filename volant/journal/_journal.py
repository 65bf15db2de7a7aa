"""The journal: the only writer of the database.

**Commit, then publish.** Once the disk has confirmed a transaction, the replies, the projection and the events change,
all three at once. So no reader sees one without the others.

**Group commit.** A commit costs a sync of the disk, however much is in the transaction. So one task makes one
transaction of all waiting changes (`_stage`) and writes it in a worker thread, while the next group gathers. No timer
holds a change back: an idle journal commits at once, a busy one in larger groups.

**When the disk fails,** senders get a 503 and nothing has changed. Readers go on, and the next change tries again. A
transaction that takes too long may still succeed: its senders get a 503 that says so, and further changes are refused
until the disk has answered. Then the journal takes over what was written. Rejected: to abandon the thread and start
again, as there would be two writers and an unknown state.

**When the actor crashes,** the next incarnation loads everything under the write lock, and publishes the events that
were committed and not published. Any error but the disk's is a bug and crashes the actor.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import apsw
import msgspec
import trio

from actors import Actor, Deferred, Request, check_fence, handles
from volant.model import EventId, IllegalTransition, Problem

from . import _definition_changes as _definition_changes  # registers its decisions
from ._audit import AUDIT_EPOCH
from ._changes import DECISIONS, decide
from ._database import RESERVE_BYTES, Database, Numbered
from ._definitions import changes_in
from ._errors import (
    BadRow,
    DuplicateRequest,
    StaleRow,
    full,
    overloaded,
    slow,
    unwritable,
)
from ._events import FrameLog
from ._operations import Operation
from ._schema import CHANGED_PAGE, damaged, is_changed_page, untrusted
from ._stage import Stage
from ._store import Store
from .messages import Draft, Drafted, StillThere

_GROUP = 128
_MAX_WAITING = 4096
_TRIM_BITE = 1000
_TRIM_SLACK = 1000
_COMPACT_EVERY = 1000
"""Commits between checks for unused space that retention has not left, and for a large write-ahead log."""
_PROBE_S = 1.0
_PROBE_AT_LEAST_S = 30.0
_TRIM_AT_LEAST_S = 1.0
_TRIM_AT_MOST_S = 3600.0
_RECORD_FIELDS = ("caller", "address", "project", "operation", "target", "outcome", "request_id")

_logger = logging.getLogger("volant.journal")
_events_logger = logging.getLogger("volant.event")
_audit_logger = logging.getLogger("volant.audit")


class _Retained(msgspec.Struct):
    """Events or audit records, which retention removes."""

    table: Numbered
    log: FrameLog[Any]
    most: int
    max_age_s: float
    oldest_at: int | None = None
    """The time of the oldest one in seconds since 1970, None if none can expire."""
    due: bool = False
    """Whether some may have expired."""

    @property
    def expires_at(self) -> float:
        """The expiry of the oldest one, in seconds since 1970."""
        return math.inf if self.oldest_at is None else self.oldest_at + self.max_age_s

    @property
    def what(self) -> str:
        return "events" if self.table == "events" else "audit records"

    def check_count(self) -> None:
        """Checks whether there are too many."""
        count = self.log.newest.seq - self.log.oldest.seq + 1
        if count > self.most + min(_TRIM_SLACK, self.most // 10):
            self.due = True


class Journal(Actor):
    """Takes the messages of `volant.journal.messages`."""

    mailbox = 256

    def __init__(self, store: Store, *, commit_deadline_s: float = 5.0) -> None:
        self._store = store
        self._deadline_s = commit_deadline_s
        self._last_vm_id = 0
        self._waiting: deque[tuple[Request[Any], Deferred[Any]]] = deque()
        self._wake = trio.Event()
        retention = store.retention
        self._kept = (
            _Retained("events", store.events, retention.max_events, retention.max_age_s),
            _Retained("audit", store.audit, retention.max_records, retention.records_max_age_s),
        )
        # A previous incarnation may have left space.
        self._compact_due = True
        self._stalled = False
        self._has_reserve = True
        self._probe_due = False
        self._troubled = trio.Event()
        self._commits = self._answered = self._failures = self._largest = 0
        self._last_s = self._slowest_s = 0.0
        self._last_error = ""

    async def on_start(self) -> None:
        """Opens the database and loads its state. :raises DatabaseRefused: another version or another program wrote the
        database, or it is damaged."""
        store = self._store
        check_fence()
        try:
            self._database = await store.host.threads.run(Database.open, store.host, store.path)
            self.ctx.stack.push_async_callback(store.host.threads.run, self._database.close)
            published = store.events.newest.seq if store.events.epoch else None
            records = store.audit.newest.seq if store.audit.epoch else None
            loaded = await store.host.threads.run(self._database.load, published, records)
        except BadRow as bad:
            raise untrusted(store.path, bad) from bad
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise damaged(store.path, error) from error
        except apsw.IOError as error:
            if is_changed_page(error):
                raise damaged(store.path, CHANGED_PAGE) from error
            raise
        check_fence()
        store.trouble = None
        self._has_reserve = await store.host.threads.run(self._database.keep_reserve)
        if not self._has_reserve:
            self._set_trouble(full().detail)
        store.events.attach(loaded.epoch, loaded.oldest_seq, loaded.newest_seq, loaded.unpublished)
        audit = loaded.audit
        store.audit.attach(AUDIT_EPOCH, audit.oldest_seq, audit.newest_seq, audit.unpublished)
        store.projection.replace(
            loaded.rows,
            loaded.named,
            loaded.drain,
            EventId(loaded.epoch, loaded.newest_seq),
        )
        store.responses.replace(loaded.responses)
        store.keys.replace(loaded.keys, loaded.keys_required)
        self._last_vm_id = max(loaded.last_vm_id, store.ids_taken)
        for kept, oldest_at in zip(self._kept, (loaded.oldest_at, audit.oldest_at), strict=True):
            kept.oldest_at = oldest_at
        self.ctx.spawn(self._write, name="writer")
        self.ctx.spawn(self._watch_age, name="retention")
        self.ctx.spawn(self._probe_again, name="probe")

    @handles(*DECISIONS)  # type: ignore[untyped-decorator]  # checkers know up to three types
    async def change(self, message: Request[Any]) -> Deferred[Any]:
        """Have the change decided and committed with the next group."""
        deferred = self.ctx.defer(message)
        refusal = self._refusal()
        if refusal is not None:
            deferred.fail(refusal)
        else:
            self._waiting.append((message, deferred))
            self._wake.set()
        return deferred

    @handles(Draft)
    async def draft(self, message: Draft) -> Drafted:
        refusal = self._refusal()
        if refusal is not None:
            raise refusal
        stage = self._new_stage()
        reply = decide(stage, message.change)
        return Drafted(reply, changes_in(stage.operations))

    def _refusal(self) -> Problem | None:
        """Returns why no change can be made now, None if changes can be made."""
        if self._stalled:
            return slow(self._deadline_s)
        if not self._has_reserve:
            return full()
        return overloaded(len(self._waiting)) if len(self._waiting) >= _MAX_WAITING else None

    @handles(StillThere)
    async def still_there(self, message: StillThere) -> None:
        del message

    def inspect(self) -> Mapping[str, object]:
        return {
            "waiting": len(self._waiting),
            "stalled": self._stalled,
            "commits": self._commits,
            "requests_committed": self._answered,
            "largest_group": self._largest,
            "failed_commits": self._failures,
            "last_error": self._last_error,
            "trouble": self._store.trouble,
            "last_commit_ms": round(self._last_s * 1000, 3),
            "slowest_commit_ms": round(self._slowest_s * 1000, 3),
            "stored_responses": len(self._store.responses),
        }

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            if self._waiting:
                await self._commit_group()
            if self._probe_due:
                await self._probe()
            due = next((kept for kept in self._kept if kept.due), None)
            if due is not None:
                await self._trim(due)
            elif self._compact_due:
                await self._compact()
            if not (self._waiting or self._compact_due or self._probe_due or self._is_trim_due()):
                self._wake = trio.Event()

    def _is_trim_due(self) -> bool:
        return any(kept.due for kept in self._kept)

    def _new_stage(self) -> Stage:
        """Returns a stage on top of what is committed."""
        store = self._store
        return Stage(
            store.projection,
            store.responses,
            store.keys,
            store.creates,
            max(self._last_vm_id, store.ids_taken),
            store.host.clock.now(),
            store.networking,
            store.audit.newest.seq,
            store.used_elsewhere,
        )

    async def _commit_group(self) -> None:
        store = self._store
        stage = self._new_stage()
        answers: list[tuple[Deferred[Any], object, Exception | None]] = []
        for _ in range(min(_GROUP, len(self._waiting))):
            message, deferred = self._waiting.popleft()
            try:
                answers.append((deferred, decide(stage, message), None))
            except (DuplicateRequest, Problem, StaleRow, IllegalTransition, ValueError) as refusal:
                answers.append((deferred, None, refusal))
        stage.drop_surplus_responses()
        if stage.operations:
            failure = await self._commit(stage.operations, [deferred for deferred, _, _ in answers])
            check_fence()
            if failure is not None:
                # Refusals too: they may be based on changes of this transaction.
                for deferred, _, _ in answers:
                    deferred.fail(unwritable(failure) or failure)
                return
            self._last_vm_id = stage.last_vm_id
            store.projection.apply(
                stage.rows,
                stage.changed,
                stage.drain,
                stage.last_event,
            )
            store.keys.apply(stage.keys.changed, stage.keys_required)
            store.responses.apply(stage.responses.values(), stage.dropped_responses)
            store.events.append(stage.frames)
            store.audit.append([frame for _, frame in stage.records])
            for cause, frame in stage.records:
                cause.recorded, cause.vm_id = frame.record.outcome, frame.record.vm_id
            store.figures.count(frame.event for frame in stage.frames)
            store.figures.records += len(stage.records)
            _log_events(stage)
            _log_records(stage)
            self._answered += len(answers)
            self._largest = max(self._largest, len(answers))
            for kept in self._kept:
                kept.check_count()
        store.creates.add(stage.new_creates, stage.now)
        for deferred, value, error in answers:
            if error is None:
                deferred.reply(value)
            else:
                deferred.fail(error)

    async def _commit(self, operations: Sequence[Operation], deferreds: list[Deferred[Any]]) -> Exception | None:
        """Write a transaction, or an empty one as a probe. Returns the error if the disk did not take it."""
        host = self._store.host
        failure: Exception | None = None
        began = host.clock.monotonic()
        check_fence()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fail_when_slow, deferreds)
            try:
                await host.threads.run(self._database.write, operations)
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
        self._stalled = False
        self._last_s = host.clock.monotonic() - began
        self._slowest_s = max(self._slowest_s, self._last_s)
        self._store.figures.commits.observe(self._last_s)
        if failure is None:
            if self._store.trouble is not None:
                _logger.warning("changes are accepted again")
                self._store.trouble = None
            self._commits += 1
            if self._commits % _COMPACT_EVERY == 0:
                self._compact_due = True
            return None
        self._failures += 1
        self._store.figures.failed_commits += 1
        self._last_error = f"{type(failure).__name__}: {failure}"
        problem = unwritable(failure)
        if problem is None:
            raise failure
        if self._store.trouble != problem.detail:
            _logger.error("a commit failed and changed nothing: %s", self._last_error)
        self._set_trouble(problem.detail)
        return failure

    def _set_trouble(self, why: str) -> None:
        self._store.trouble = why
        self._troubled.set()

    async def _probe_again(self) -> None:
        """Probes the disk while changes are refused or space is low, as there may be no change that would try."""
        host, directory = self._store.host, self._store.path.parent
        while True:
            try:
                is_low = await host.threads.run(host.disk.free, directory) < RESERVE_BYTES
            except OSError:
                is_low = True
            if is_low or self._store.trouble is not None:
                self._probe_due = True
                self._wake.set()
            with trio.move_on_after(_PROBE_AT_LEAST_S):
                await self._troubled.wait()
                await trio.sleep(_PROBE_S)
            self._troubled = trio.Event()

    async def _probe(self) -> None:
        self._probe_due = False
        if not self._has_reserve:
            check_fence()
            self._has_reserve = await self._store.host.threads.run(self._database.keep_reserve)
            check_fence()
        if self._has_reserve:
            await self._commit((), [])
        if self._store.trouble is not None:
            self._troubled.set()

    async def _fail_when_slow(self, deferreds: list[Deferred[Any]]) -> None:
        """Fails the changes that wait for a slow commit. A reply that comes later is ignored."""
        await trio.sleep(self._deadline_s)
        _logger.error("a commit takes longer than %g s; changes are refused until it is done", self._deadline_s)
        self._stalled = True
        self._set_trouble(slow(self._deadline_s).detail)
        for deferred in deferreds:
            deferred.fail(slow(self._deadline_s))
        while self._waiting:
            self._waiting.popleft()[1].fail(slow(self._deadline_s))

    async def _trim(self, kept: _Retained) -> None:
        """Removes a limited number of expired events or records, so that commits wait only briefly."""
        kept.due = False
        store = self._store
        cutoff_at = int(store.host.clock.now().timestamp() - kept.max_age_s)
        below = kept.log.newest.seq - kept.most + 1
        check_fence()
        try:
            with kept.log.trimming():
                trimmed = await store.host.threads.run(self._database.trim, kept.table, cutoff_at, below, _TRIM_BITE)
                check_fence()
                kept.log.trimmed(trimmed.oldest_seq)
        except apsw.Error as error:
            if unwritable(error) is None:
                raise
            _logger.warning("old %s can't be removed: %s", kept.what, error)
            return
        kept.oldest_at = trimmed.oldest_at
        kept.due = trimmed.more
        self._compact_due = True

    async def _compact(self) -> None:
        """Returns a limited piece of unused space to the disk."""
        check_fence()
        try:
            self._compact_due = await self._store.host.threads.run(self._database.compact)
        except apsw.Error as error:
            if unwritable(error) is None:
                raise
            self._compact_due = False
            _logger.warning("unused space can't be returned to the disk: %s", error)
        check_fence()

    async def _watch_age(self) -> None:
        while True:
            expires_at = min(kept.expires_at for kept in self._kept)
            wait_s = expires_at - self._store.host.clock.now().timestamp()
            await trio.sleep(min(_TRIM_AT_MOST_S, max(_TRIM_AT_LEAST_S, wait_s)))
            for kept in self._kept:
                kept.due = True
            self._wake.set()


def _log_events(stage: Stage) -> None:
    if _events_logger.isEnabledFor(logging.INFO):
        for frame in stage.frames:
            event = frame.event
            if event.image is not None:
                facts = {"image": event.image.reference, "event": event.type}
                _events_logger.info("image %s: %s", event.image.reference, event.message, extra=facts)
                continue
            facts = {"vm": event.name, "event": event.type}
            _events_logger.info("VM %s: %s: %s", event.name, event.status, event.message, extra=facts)


def _log_records(stage: Stage) -> None:
    if stage.records and _audit_logger.isEnabledFor(logging.INFO):
        for _, frame in stage.records:
            record = frame.record
            facts: dict[str, object] = {name: getattr(record, name) for name in _RECORD_FIELDS}
            if record.vm_id is not None:
                facts["vm"] = record.target
            _audit_logger.info(
                "%s %s %s: %s", record.caller, record.operation, record.target, record.outcome, extra=facts
            )
