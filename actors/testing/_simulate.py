"""A whole program on virtual time, decided by a seed.

A seed decides three things, each by a stream of its own: the order in which Trio runs tasks that are ready at the same
time, what the program draws from `sim.rng`, and which fault sites fire. Time is virtual: when every task waits, the
clock jumps to the next deadline. So a run is a function of its seed, in any process and under any PYTHONHASHSEED,
unless the program lets something else decide. What can be found of that is an error at once (`_guard.py`), and
`check_deterministic` finds the rest by what comes of it.

The garbage collector is held during a run and works at fixed steps instead: when it runs by itself depends on what else
the process has done, and it closes asynchronous generators, which is work for the scheduler.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar, final

import trio

from .._exit import Exit
from .._fault import current_faults
from .._tap import TapEvent, ambient_tap
from ._errors import SimulationError
from ._faults import Faults, Plan
from ._guard import Guard
from ._switches import seeded_scheduling
from ._trace import Entry, Trace

T = TypeVar("T")


@final
class Simulation:
    """What a simulated program's main function is given. It has no public constructor: `simulate` makes it."""

    def __init__(
        self,
        seed: int,
        faults: Plan | None,
        limit_s: float,
        limit_steps: int,
        *,
        keep_all: bool = False,
        expected: deque[Entry] | None = None,
    ) -> None:
        if not limit_s > 0 or limit_steps < 1:
            raise ValueError(f"limit_s and limit_steps must be positive, not {limit_s} and {limit_steps}")
        # Every pytest run imports this module, and trio.testing is as large as all the rest.
        from trio.testing import MockClock

        self._seed = seed
        self._clock = MockClock(autojump_threshold=0)
        self._scope = trio.CancelScope()
        self._failure: SimulationError | None = None
        self._trace = Trace(
            self._clock,
            self._fail,
            limit_s=limit_s,
            limit_steps=limit_steps,
            keep_all=keep_all,
            expected=expected,
        )
        self._rng = Random(f"{seed}/program")
        self._faults = Faults(seed, self._trace.note)
        self._faults.plan(faults or {})

    @property
    def seed(self) -> int:
        """The seed that decides this run."""
        return self._seed

    @property
    def rng(self) -> Random:
        """The program's own chance: hand it to `open_system(…, rng=sim.rng)` and to whatever draws."""
        return self._rng

    @property
    def faults(self) -> Faults:
        """Which fault sites fire."""
        return self._faults

    @property
    def now_s(self) -> float:
        """The virtual time, in seconds since the run began; inside of it the same as `trio.current_time()`."""
        return self._clock.current_time()

    @property
    def steps(self) -> int:
        """How often a task has run so far."""
        return self._trace.steps

    @property
    def digest(self) -> str:
        """The run so far, in 16 hexadecimal digits: equal when task after task ran at the same virtual time."""
        return self._trace.digest

    def note(self, text: str) -> None:
        """Adds a line to the trace, and so to what must be the same in every run with this seed."""
        self._trace.note(text)

    def trace(self, last: int = 50) -> list[str]:
        """The last entries of the trace as text, 200 at most."""
        return self._trace.last(last)

    def _tapped(self, event: TapEvent) -> None:
        what = event.what
        kind = str(what) if type(what) is Exit else type(what).__qualname__
        source = f" from {event.sender}" if event.sender else ""
        self._trace.note(f"{event.kind} {event.name} {kind}{source}", detail=what)

    def _fail(self, error: SimulationError) -> None:
        if self._failure is None:
            self._failure = error
            self._scope.cancel()

    def _hold_clock(self, hold: bool) -> None:
        self._trace.held += 1 if hold else -1
        self._clock.autojump_threshold = math.inf if self._trace.held else 0

    def _run(self, main: Callable[[Simulation], Awaitable[T]]) -> T:
        if trio.lowlevel.in_trio_run():
            raise RuntimeError("simulate() runs a Trio program of its own: call it from a plain function")
        values: list[T] = []

        async def root() -> None:
            self._trace.main = trio.lowlevel.current_task()
            current_faults.set(self._faults.hit)
            ambient_tap.set(self._tapped)
            with self._scope:
                values.append(await main(self))

        guard = Guard(self._fail, self._hold_clock)
        collected = gc.isenabled()
        gc.disable()
        try:
            with seeded_scheduling(Random(f"{self._seed}/schedule")), guard.watching():
                trio.run(root, clock=self._clock, instruments=[self._trace])
            if self._failure is None:
                self._trace.note(f"the end; chance goes on with {self._rng.random()}")
                self._trace.finish()
        except BaseException as exc:
            if self._failure is None or not isinstance(exc, Exception):
                exc.add_note(self._story())
                raise
            if self._failure is not exc:
                self._failure.__context__ = exc
        finally:
            if collected:
                gc.enable()
        if self._failure is not None:
            self._failure.add_note(self._story())
            raise self._failure
        return values[0]

    def _story(self) -> str:
        figures = f"{self.now_s:.6f} virtual seconds and {self.steps:,} steps"
        lines = "\n".join(f"  {line}" for line in self.trace(last=12))
        return f"Simulation with seed {self._seed}, after {figures}. The last of it:\n{lines}"


def simulate(
    main: Callable[[Simulation], Awaitable[T]],
    *,
    seed: int,
    faults: Plan | None = None,
    limit_s: float = 86_400.0,
    limit_steps: int = 1_000_000,
) -> T:
    """Runs `main` to its end on virtual time, and returns what it returns. The same seed gives the same run.

    Call it from a plain function, such as a test without `async`. `faults` is what is turned on from the beginning, as
    `Faults.turn_on` would: `{"journal.commit": (0.1, OSError)}`. `limit_s` is in virtual seconds, `limit_steps` in
    steps of tasks.

    :raises RealWorld: the program reached for real time, chance, threads or I/O.
    :raises Stuck: every task waits for ever, or a limit is passed.
    :raises ValueError: a limit that is not positive, or a wrong probability.
    :raises RuntimeError: called from inside a Trio program, or while another simulation runs in this process.

    Besides, whatever `main` raises. An exception carries the seed and the last steps as a note.
    """
    return Simulation(seed, faults, limit_s, limit_steps)._run(main)


def check_deterministic(
    main: Callable[[Simulation], Awaitable[object]],
    *,
    seed: int,
    faults: Plan | None = None,
    limit_s: float = 86_400.0,
    limit_steps: int = 1_000_000,
) -> str:
    """Runs `main` twice with one seed, and fails at the first difference between the two, which it shows.

    Returns the digest of the run. To compare processes too, run this in several and compare the digests; the order of
    a set of strings, for one, only changes between processes.

    :raises NotDeterministic: the two runs differ. The second is ended at the first difference.

    Besides, what `simulate` raises, when both runs raise it.
    """
    first = Simulation(seed, faults, limit_s, limit_steps, keep_all=True)
    ended: BaseException | None = None
    try:
        first._run(main)
    except Exception as exc:
        ended = exc
    second: Any = Simulation(seed, faults, limit_s, limit_steps, expected=first._trace.entries)
    second._run(main)
    if ended is not None:
        raise ended
    return first.digest
