"""The trace of a run: the order and times of its tasks, and notes. It must be the same for the same seed.

The run folds its trace into one number, and keeps the last entries for people. The same instrument detects a stuck run:
with a clock that jumps, Trio spins forever when every task waits forever.
"""

from __future__ import annotations

import gc
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, TypeAlias

import trio
from trio.lowlevel import Task, current_statistics

from ._clock import JumpingClock
from ._errors import NotDeterministic, SimulationError, Stuck
from ._guard import is_internal

_KEPT: Final = 200
_DETAIL: Final = 400
_COLLECT_EVERY: Final = 20_000
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")
_MASK: Final = (1 << 64) - 1


Entry: TypeAlias = tuple[float, tuple[int, str]]
"""A time with the number and name of the task that ran, numbered as they first ran; or with 0 and a note."""


def _text(entry: Entry) -> str:
    at_s, (number, text) = entry
    return f"{at_s:12.6f} s  {f'#{number}' if number else 'note':>5}  {text}"


class Trace(trio.abc.Instrument):
    """Records a run, compares it with another, and calls `failed` when it is stuck."""

    def __init__(
        self,
        clock: JumpingClock,
        failed: Callable[[SimulationError], None],
        *,
        limit_s: float,
        limit_steps: int,
        keep_all: bool,
        expected: deque[Entry] | None,
    ) -> None:
        self.entries: deque[Entry] = deque(maxlen=None if keep_all else _KEPT)
        self.steps = 0
        self.main: Task | None = None
        self.held = 0
        self._clock = clock
        self._failed = failed
        self._limit_s = limit_s
        self._limit_steps = limit_steps
        self._expected = None if expected is None else iter(expected)
        self._compares = keep_all or expected is not None
        self._count = 0
        self._hash = 0
        self._now_s = clock.current_time()
        self._tasks: dict[Task, tuple[int, str]] = {}
        self._numbered = 0
        self._quiet_ticks = 0
        self._steps_before = -1
        self._collect_at = _COLLECT_EVERY

    @property
    def digest(self) -> str:
        """A digest of the run so far, 16 hexadecimal digits."""
        return f"{self._hash & _MASK:016x}"

    def note(self, text: str, detail: object = None) -> None:
        """Adds a note. `detail` is for comparing two runs, and not part of the digest."""
        if " at 0x" in text:
            text = _ADDRESS.sub("", text)
        self._hash = hash((self._hash, self._now_s, _checksum(text)))
        if self._compares and detail is not None:
            text = f"{text} {_ADDRESS.sub('', repr(detail))[:_DETAIL]}"
        self._add((self._now_s, (0, text)))

    def last(self, entries: int) -> list[str]:
        """Returns the last entries as text for people."""
        return [_text(entry) for entry in list(self.entries)[-entries:]]

    def finish(self) -> None:
        """Compares the end of the run."""
        if self._expected is not None:
            missing = next(self._expected, None)
            if missing is not None:
                self._differ(missing, None)

    def before_task_step(self, task: Task) -> None:
        self.steps += 1
        known = self._tasks.get(task) or self._number(task)
        now_s = self._now_s
        self._hash = hash((self._hash, now_s, known[0]))
        if self._expected is None:
            self.entries.append((now_s, known))
        else:
            self._add((now_s, known))
        if self.steps == self._limit_steps:
            self._failed(Stuck(f"more than {self._limit_steps:,} steps of tasks\n{self._waiting()}"))

    def task_exited(self, task: Task) -> None:
        self._tasks.pop(task, None)

    def before_io_wait(self, timeout: float) -> None:
        if self.steps >= self._collect_at:
            self._collect_at = self.steps + _COLLECT_EVERY
            gc.collect(1)
        if self.steps != self._steps_before:
            self._steps_before = self.steps
            self._quiet_ticks = 0
            return
        self._quiet_ticks += 1
        if self._quiet_ticks > 1 and not self.held:
            figures = current_statistics()
            if figures.seconds_to_next_deadline == float("inf") and not figures.tasks_runnable:
                self._failed(Stuck(f"every task waits for ever, so nothing will happen\n{self._waiting()}"))

    def after_io_wait(self, timeout: float) -> None:
        self._now_s = self._clock.current_time()
        if self._now_s > self._limit_s:
            self._failed(Stuck(f"not finished after {self._limit_s:g} virtual seconds\n{self._waiting()}"))
            self._limit_s = float("inf")

    def _number(self, task: Task) -> tuple[int, str]:
        self._numbered += 1
        name = _name(task)
        self._hash = hash((self._hash, _checksum(name)))
        self._tasks[task] = numbered = (self._numbered, name)
        return numbered

    def _add(self, entry: Entry) -> None:
        if self._expected is not None:
            self._count += 1
            expected = next(self._expected, None)
            if expected != entry:
                self._differ(expected, entry)
        self.entries.append(entry)

    def _differ(self, expected: Entry | None, got: Entry | None) -> None:
        self._expected = None
        before = "\n".join(f"            {_text(entry)}" for entry in list(self.entries)[-8:])
        self._failed(
            NotDeterministic(
                f"two runs with the same seed differ at entry {self._count:,} of the trace\n"
                f"{before}\n"
                f"    first:  {_text(expected) if expected else 'had ended'}\n"
                f"    second: {_text(got) if got else 'has ended'}\n"
                "Look for what the seed does not decide: the order of a set, id() or hash() of an object, the state "
                "that an earlier run left in a module, or the real world behind a function that C code calls."
            )
        )

    def _waiting(self) -> str:
        if self.main is None:
            return ""
        lines = list(_describe(self.main, self._tasks))
        shown = "\n".join(f"  {line}" for line in lines[:40])
        return shown + (f"\n  and {len(lines) - 40} more" if len(lines) > 40 else "")


@lru_cache(4096)
def _checksum(text: str) -> int:
    """Returns a hash that is the same in every process."""
    return zlib.crc32(text.encode())


def _name(task: Task) -> str:
    """Returns the name without its module, which differs between `__main__` and pytest."""
    inner = getattr(task.coro, "__qualname__", "")
    if inner and task.name.endswith("." + inner):
        return inner
    return _ADDRESS.sub("", task.name)


def _describe(task: Task, known: dict[Task, tuple[int, str]]) -> Iterator[str]:
    place = ""
    for frame, line in task.iter_await_frames():
        if not is_internal(frame.f_code.co_filename):
            place = f" at {frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"
    number, name = known.get(task, (0, task.name))
    yield f"#{number} {name}{place}"
    for nursery in task.child_nurseries:
        for child in sorted(nursery.child_tasks, key=lambda child: known.get(child, (0, ""))[0]):
            yield from _describe(child, known)
