"""Long runs cost no more memory than short ones. The bench does the same with ten million messages."""

from __future__ import annotations

import gc
import math
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from trio.lowlevel import current_statistics
from trio.testing import wait_all_tasks_blocked

from actors import Actor, ActorDown, Child, DynamicSupervisor, Log, Request, handles, open_system

MESSAGES = 1_000_000
CHILDREN = 10_000


@dataclass(frozen=True)
class Count(Request[int]):
    number: int


@dataclass(frozen=True)
class Note:
    number: int


class Counter(Actor):
    mailbox = 1000

    def __init__(self) -> None:
        self.count = 0

    @handles(Note)
    async def note(self, message: Note) -> None:
        self.count += 1

    @handles(Count)
    async def answer(self, message: Count) -> int:
        return self.count


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.full
@pytest.mark.slow
async def test_a_million_messages_do_not_grow_memory() -> None:
    pool = DynamicSupervisor()
    async with open_system(pool) as system:
        ref = await pool.start_child(Child("counter", Counter))
        sizes: list[int] = []
        for number in range(MESSAGES):
            if number % 500 == 499:
                timeout_s = math.inf if number % 1000 == 999 else 60
                assert await ref.ask(Count(number), timeout_s=timeout_s) == number - number // 500
            else:
                ref.tell(Note(number))
            if number % (MESSAGES // 10) == 0:
                sizes.append(resident())
        assert max(sizes[2:]) - sizes[1] < 2_000_000, sizes
        assert ref.inspect()["mailbox"]["handled"] == MESSAGES
        assert len(system.trace(ref)) == 100
        assert system.dead_letters()["total"] == 0


@pytest.mark.full
@pytest.mark.slow
async def test_ten_thousand_children_start_and_stop_and_leave_nothing() -> None:
    pool = DynamicSupervisor()
    async with open_system(pool) as system:
        tasks = current_statistics().tasks_living
        objects: list[int] = []
        for _ in range(2):
            refs = [await pool.start_child(Child(str(number), Counter)) for number in range(CHILDREN)]
            assert len(pool.names) == CHILDREN
            assert await refs[-1].ask(Count(0), timeout_s=60) == 0
            for number in range(CHILDREN):
                await pool.stop_child(str(number))
            with pytest.raises(ActorDown):
                refs[0].tell(Note(0))
            refs.clear()
            await wait_all_tasks_blocked()
            assert pool.names == []
            assert system.tree()["children"] == []
            assert current_statistics().tasks_living == tasks
            gc.collect()
            objects.append(len(gc.get_objects()))
        assert objects[1] - objects[0] < 100, objects


def test_cursors_that_never_read_cost_nothing() -> None:
    def use(cursors: int) -> int:
        log = Log(max_frames=100, max_bytes=10_000)
        readers = [log.cursor(after=0) for _ in range(cursors)]
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(20_000):
            log.append(b"x" * 50)
        assert len(readers) == cursors
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        alone, lagging = use(0), use(1000)
    finally:
        tracemalloc.stop()
    assert lagging <= alone + 1000
