"""Measures what the journal adds to SQLite, and a VM's log to a file.

The baseline of a commit writes the same two rows in one transaction to a database with the same settings, so both wait
for the disk alike. With many writers the journal commits pending changes in one transaction. It is measured against one
transaction for each change, as SQLite does it, and against one writer that puts 32 into each transaction, the optimum.
"""

from __future__ import annotations

import os
import time
from itertools import count, cycle, islice
from pathlib import Path

import apsw
import msgspec
import trio

from actors import ONE_FOR_ONE, Child, Ref, Supervisor, open_system
from tests.names import named
from volant.host import Host
from volant.journal import CommitSteps, CreateRow, Journal, JournalRef, Store
from volant.journal._schema import open_writer
from volant.logs import LogEntry, VmLogs
from volant.model import DEFAULT_PROJECT, CreateVm, Status, Step, VmRow

from ._figure import Figure, Pairs
from ._world import scratch

ROUNDS = 5
ROUND_S = 0.7
WRITERS = 32
LINE = b"x" * 99
LINES = 256
BATCHES = 500

_ASK_S = 30.0
_LIFE = (Status.STARTING, Status.RUNNING, Status.STOPPING, Status.STOPPED)


async def journal() -> list[Figure]:
    """Events a second, each committed with its VM's change, by one writer and by 32."""
    one, many, grouped = Pairs(), Pairs(), Pairs()
    with scratch() as directory:
        bare = open_writer(Host(), directory / "bare.db")
        store = Store(Host(), directory / "journal.db")
        child = Child("journal", lambda: Journal(store))
        try:
            async with open_system(Supervisor(ONE_FOR_ONE, intensity=1, period_s=60, children=[child])) as system:
                ref: Ref[Journal] = system["journal"]
                writers = [await Writer.create(ref, f"vm{number}") for number in range(WRITERS)]
                rows = _Bare(bare, msgspec.json.encode(store.projection.rows()[0]), await _newest_frame(store))
                for _ in range(ROUNDS):
                    plain = await trio.to_thread.run_sync(rows.changes_per_s, ROUND_S, 1)
                    best = await trio.to_thread.run_sync(rows.changes_per_s, ROUND_S, WRITERS)
                    one.add(await _changes_per_s(writers[:1], ROUND_S), plain)
                    rate = await _changes_per_s(writers, ROUND_S)
                    many.add(rate, plain)
                    grouped.add(rate, best)
        finally:
            bare.close()
    return [
        Figure(name, pairs.value, "events/s", pairs.ratio, f"bare SQLite's {pairs.other:.0f}, as durable, {how}")
        for name, pairs, how in (
            ("journal_1_writer", one, "one at a time"),
            (f"journal_{WRITERS}_writers", many, "one at a time"),
            (f"journal_{WRITERS}_writers_grouped", grouped, f"{WRITERS} in each transaction"),
        )
    ]


async def vmlog() -> list[Figure]:
    """MB of lines a second into a VM's log, against the same lines into a file."""
    against = Pairs()
    size = LINES * BATCHES * (len(LINE) + 1)
    with scratch() as directory:
        host = Host()
        logs = VmLogs(host, directory / "logs")
        await logs.prepare()
        log = logs.open(1, named("bench"))
        position = 0
        for _ in range(ROUNDS):
            against.bare.append(size / 1e6 / await trio.to_thread.run_sync(_write_file, directory / "bare.log"))
            now = host.clock.now()
            took = 0.0
            for _ in range(BATCHES):
                entries = []
                for _ in range(LINES):
                    position += len(LINE) + 1
                    entries.append(
                        LogEntry(
                            stream="console", line=LINE, timestamp=now, partial=False, source="1.1", position=position
                        )
                    )
                began = time.perf_counter()
                log.append(entries)
                took += time.perf_counter() - began
                await trio.lowlevel.checkpoint()
            against.ours.append(size / 1e6 / took)
        log.release()
        logs.close()
    return [Figure(
        "vmlog", against.value, "MB/s", against.ratio,
        f"the same lines of {len(LINE)} bytes into a file, {against.other:.0f} MB/s",
    )]  # fmt: skip


class Writer:
    """A writer that changes one VM again and again."""

    def __init__(self, ref: JournalRef, row: VmRow) -> None:
        self._ref = ref
        self._row = row
        self._next = cycle(_LIFE)

    @classmethod
    async def create(cls, ref: JournalRef, name: str) -> Writer:
        request = CreateVm(name=name, cpu_cores=1, memory_mb=128)
        return cls(ref, await ref.ask(CreateRow(request, DEFAULT_PROJECT), timeout_s=_ASK_S))

    async def change(self) -> None:
        """Makes one change with its event, durable when it returns."""
        step = Step(msgspec.structs.replace(self._row, status=next(self._next)), "benched")
        row = await self._ref.ask(CommitSteps(self._row.id, self._row.revision, (step,)), timeout_s=_ASK_S)
        assert row is not None
        self._row = row


async def _changes_per_s(writers: list[Writer], seconds: float) -> float:
    done = 0
    began = time.perf_counter()

    async def write(writer: Writer) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await writer.change()
            done += 1

    async with trio.open_nursery() as nursery:
        for writer in writers:
            nursery.start_soon(write, writer)
    return done / (time.perf_counter() - began)


async def _newest_frame(store: Store) -> bytes:
    async with store.events.cursor("oldest") as cursor:
        taken = await cursor.take()
    assert isinstance(taken, list)
    return taken[-1].data


class _Bare:
    """The journal's two statements on bare SQLite."""

    def __init__(self, connection: apsw.Connection, row: bytes, frame: bytes) -> None:
        self._execute = connection.execute
        self._row = row
        self._frame = frame
        self._numbers = count(1)
        self._execute("INSERT INTO vms VALUES (1, 'default', 'bench', 0, ?)", (row,))

    def changes_per_s(self, seconds: float, group: int) -> float:
        """Writes rows, `group` of them in one transaction."""
        began = time.perf_counter()
        done = 0
        while time.perf_counter() - began < seconds:
            self._execute("BEGIN IMMEDIATE")
            for number in islice(self._numbers, group):
                self._execute("UPDATE vms SET revision = ?, row = ? WHERE id = 1", (number, self._row))
                self._execute(
                    "INSERT INTO events VALUES (?, ?, 1, 'bench', 'VM_RUNNING', ?)",
                    (number, int(time.time()), self._frame),
                )
            self._execute("COMMIT")
            done += group
        return done / (time.perf_counter() - began)


def _write_file(path: Path) -> float:
    data = (LINE + b"\n") * LINES
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        began = time.perf_counter()
        for _ in range(BATCHES):
            os.write(fd, data)
        return time.perf_counter() - began
    finally:
        os.close(fd)
