"""Helpers for tests of the journal."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec
import trio

from actors import ONE_FOR_ONE, Child, Ref, Request, Supervisor, System, open_system
from volant.host import Host
from volant.host._host import LinuxClock, LinuxThreads
from volant.journal import CommitSteps, CreateRow, EventCursor, EventFrame, EventLog, Journal, Retention, Store
from volant.model import DEFAULT_PROJECT, CreateVm, EventId, Networking, Phase, Status, Step, VmRow

T = TypeVar("T")
TIMEOUT_S = 10.0


class SetClock(LinuxClock):
    """A time of day that the test sets."""

    def __init__(self) -> None:
        self.time = datetime(2025, 9, 24, 12, 34, 56, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time


class ClockHost(Host):
    """The real host, with a time of day that the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = self._clock = SetClock()

    def pass_time(self, **delta: float) -> None:
        self._clock.time += timedelta(**delta)


class GatedHost(ClockHost, LinuxThreads):
    """A slow or failing disk: commits call `before` in their thread, if it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], None] | None = None
        self.threads = self

    def hold(self) -> tuple[trio.Event, Callable[[], None]]:
        """Holds commits; returns an event that one has begun, and what lets them go on."""
        begun, gate, token = trio.Event(), threading.Event(), trio.lowlevel.current_trio_token()

        def wait() -> None:
            token.run_sync_soon(begun.set)
            assert gate.wait(10)

        def release() -> None:
            self.before = None
            gate.set()

        self.before = wait
        return begun, release

    async def run(self, call: Callable[..., T], *args: object) -> T:
        before = self.before
        if before is None or getattr(call, "__name__", "") != "write":
            return await super().run(call, *args)

        def gated(*inner: object) -> T:
            before()
            return call(*inner)

        return await super().run(gated, *args)


def full_error() -> None:
    """For `GatedHost.before`: fails as SQLite does when the disk is full."""
    raise apsw.FullError("database or disk is full")


class Bench:
    """A running journal."""

    def __init__(self, system: System, store: Store, journal: Ref[Journal]) -> None:
        self.system = system
        self.store = store
        self.journal = journal

    async def ask(self, message: Request[T]) -> T:
        return await self.journal.ask(message, timeout_s=TIMEOUT_S)

    async def create(self, name: str, **fields: Any) -> VmRow:
        return await self.ask(CreateRow(CreateVm(name=name, cpu_cores=1, memory_mb=128, **fields), DEFAULT_PROJECT))

    async def to(self, row: VmRow, *statuses: Status) -> VmRow:
        """Commit one step to each status."""
        steps = []
        step = row
        for status in statuses:
            step = msgspec.structs.replace(step, status=status)
            steps.append(Step(step, f"now {status}"))
        after = await self.ask(CommitSteps(row.id, row.revision, tuple(steps)))
        assert after is not None
        return after

    async def delete(self, row: VmRow) -> None:
        row = await self.to(row, Status.DELETING)
        row_out = await self.ask(CommitSteps(row.id, row.revision, (Step(None, "deleted"),)))
        assert row_out is None

    async def phase(self, row: VmRow, phase: Phase) -> VmRow:
        after = await self.ask(
            CommitSteps(row.id, row.revision, (Step(msgspec.structs.replace(row, phase=phase), "a phase"),))
        )
        assert after is not None
        return after


@asynccontextmanager
async def running(
    path: Path,
    *,
    host: Host | None = None,
    store: Store | None = None,
    retention: Retention | None = None,
    networking: Networking | None = None,
    commit_deadline_s: float = 5.0,
) -> AsyncIterator[Bench]:
    store = store or Store(host or Host(), path, retention=retention, networking=networking)
    child = Child("journal", lambda: Journal(store, commit_deadline_s=commit_deadline_s))
    async with open_system(Supervisor(ONE_FOR_ONE, intensity=5, period_s=60, children=[child])) as system:
        yield Bench(system, store, system["journal"])


async def events_after(log: EventLog, after: EventId | str | None = "oldest") -> list[EventFrame]:
    """All events there are now."""
    frames: list[EventFrame] = []
    async with log.cursor(after) as cursor:
        while cursor.position != log.newest:
            frames += await take(cursor)
    return frames


async def take(cursor: EventCursor) -> list[EventFrame]:
    """Events, and no gap."""
    taken = await cursor.take()
    assert isinstance(taken, list)
    return taken


def types(frames: list[EventFrame]) -> list[str]:
    return [str(frame.event.type) for frame in frames]


def executing(*statements: str) -> Callable[[Path], None]:
    """Returns what executes these statements in a database."""

    def change(path: Path) -> None:
        connection = apsw.Connection(str(path))
        for statement in statements:
            connection.execute(statement)
        connection.close()

    return change
