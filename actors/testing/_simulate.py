"""Runs a whole program on virtual time, decided by a seed.

A seed decides three things, each with its own random stream: the order of tasks that are ready at the same time, the
numbers from `sim.rng`, and which fault sites fire. Time is virtual: when every task waits, the clock jumps to the next
deadline. So a run is a function of its seed, in any process and under any PYTHONHASHSEED, unless the program depends on
something else. Most such dependencies are errors at once (`_guard.py`); `check_deterministic` finds the rest.

The garbage collector runs at fixed steps during a run. Otherwise its time would depend on the rest of the process, and
it closes asynchronous generators, which is work for the scheduler.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar, final

import trio

from .._cell import Cell, State
from .._errors import Fenced
from .._exit import Exit, ExitKind
from .._fence import Fence
from .._system import System
from .._tap import TapEvent, ambient_tap, current_faults
from ._clock import JumpingClock, seeded_scheduling
from ._errors import SimulationError
from ._faults import Faults, Plan
from ._guard import Guard
from ._trace import Entry, Trace


class _ClosedFence(Fence):
    __slots__ = ()

    @property
    def name(self) -> str:  # type: ignore[override]  # takes the place of the slot
        raise Fenced("the caller's incarnation has been killed; this call has no effect")


def kill(system: System, path: str) -> None:
    """Ends one incarnation like `kill -9` ends a process; for a supervisor, with all below it.

    Calls of its clean-up have no effect (`check_fence`), and `on_stop` does not run. Its supervisor treats the end as a
    crash. With the path "" the whole system dies: nothing is restarted, and the block of `open_system` still has to be
    left.

    :raises KeyError: nothing is at `path`.
    """
    _kill(system._find(path), for_good=not path)


def _kill(cell: Cell, *, for_good: bool) -> None:
    for child in cell.supervisor._children() if cell.supervisor is not None else ():
        _kill(child, for_good=True)
    if cell.state in (State.STARTING, State.RUNNING, State.STOPPING):
        cell.fence.__class__ = _ClosedFence
        if cell.actor is not None:
            cell.actor.ctx._closed = True
        cell.conclude(Exit(ExitKind.KILLED))
        cell.interrupt()
    if for_good:
        cell.request_stop()


T = TypeVar("T")


@final
class Simulation:
    """The argument of a simulated program's main function. It has no public constructor: `simulate` makes it."""

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
        self._seed = seed
        self._clock = JumpingClock()
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
        """The program's random numbers. Pass it to `open_system(…, rng=sim.rng)` and to all other users of
        randomness."""
        return self._rng

    @property
    def faults(self) -> Faults:
        """The fault sites."""
        return self._faults

    @property
    def now_s(self) -> float:
        """The virtual time in seconds since the run began; in the run it is `trio.current_time()`."""
        return self._clock.current_time()

    @property
    def steps(self) -> int:
        """The number of steps that tasks have taken."""
        return self._trace.steps

    @property
    def digest(self) -> str:
        """A digest of the run so far, 16 hexadecimal digits: equal when tasks ran in the same order and time."""
        return self._trace.digest

    def note(self, text: str) -> None:
        """Adds a line to the trace. It must be the same in every run with this seed."""
        self._trace.note(text)

    def trace(self, last: int = 50) -> list[str]:
        """Returns the last entries of the trace as text, 200 at most."""
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
        self._clock.held = self._trace.held > 0

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
    """Runs `main` to its end on virtual time, and returns its result. The same seed gives the same run.

    Call it from a plain function, such as a test without `async`. An exception has a note with the seed and the last
    steps.

    :param faults: sites that fire from the beginning, as for `Faults.turn_on`: `{"journal.commit": (0.1, OSError)}`.
    :param limit_s: the maximum number of virtual seconds.
    :param limit_steps: the maximum number of steps of tasks.
    :raises RealWorld: the program used real time, randomness, threads or I/O.
    :raises Stuck: every task waits forever, or a limit is passed.
    :raises ValueError: a limit is not positive, or a probability is not between 0 and 1.
    :raises RuntimeError: Trio runs already in this thread, or another simulation in this process.

    Also raises the errors of `main`.
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
    """Runs `main` twice with one seed, shows the first difference, and returns the digest of the run.

    Some differences only appear between processes, such as the order of a set of strings: compare the digests of
    several.

    :raises NotDeterministic: the two runs differ. The second ends at the first difference.

    Also raises the errors of `simulate`, if both runs raise them.
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
