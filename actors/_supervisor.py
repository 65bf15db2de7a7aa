"""Supervisors start, restart and stop children.

Each child has one task in its supervisor's nursery, its keeper. Where children are independent (one_for_one, dynamic),
the keeper itself restarts its child, so a slow start or a back-off delays no sibling. OTP's supervisor is one process
that restarts children in turn, and a child whose `init` hangs keeps the others down. Where children depend on each
other (one_for_all, rest_for_one), the supervisor's own task restarts them, strictly in order.

A supervisor is itself a child. When it is cancelled, it stops its children in reverse before it ends.
"""

from __future__ import annotations

import contextvars
import enum
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Final, final, overload

import trio

from ._cell import TEMPORARY, A, Cell, Child, State, SupervisorBase
from ._errors import ActorDown, NameTaken, NoSuchChild, TooManyRestarts
from ._exit import Exit, ExitKind, open_hidden_nursery
from ._fence import check_fence, current_fence
from ._ref import Ref

_GRACE_S: Final = 1.0
"""The seconds beyond its budget that a supervisor waits for a child before it turns to the next."""
_KEPT: Final = 16
_logger = logging.getLogger("actors")


class Strategy(enum.Enum):
    """The children that restart when one has to."""

    ONE_FOR_ONE = "one_for_one"
    """Only the failed child."""
    ONE_FOR_ALL = "one_for_all"
    """All children."""
    REST_FOR_ONE = "rest_for_one"
    """The failed child and those that start after it."""


ONE_FOR_ONE = Strategy.ONE_FOR_ONE
ONE_FOR_ALL = Strategy.ONE_FOR_ALL
REST_FOR_ONE = Strategy.REST_FOR_ONE


@dataclass(frozen=True, slots=True)
class Backoff:
    """The delay of a restart, in seconds. The first within the intensity's period does not wait.

    The n-th waits `base_s * factor ** (n - 2)`, at most `cap_s`, less a random share of up to a half.
    """

    base_s: float = 0.5
    factor: float = 2.0
    cap_s: float = 10.0

    def delay_s(self, restart: int, rng: Random) -> float:
        """Returns the delay in seconds before the `restart`-th restart; 1 is the first."""
        if restart <= 1:
            return 0.0
        limit_s = min(self.cap_s, self.base_s * self.factor ** min(restart - 2, 64))
        return limit_s * (1 - rng.random() / 2)


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Reports that a `DynamicSupervisor` has given up a child, which crashed more often than the intensity allows."""

    name: str
    reason: Exit


class _Supervisor(SupervisorBase):
    def __init__(self, intensity: int, period_s: float, backoff: Backoff) -> None:
        if intensity < 0 or not period_s > 0:
            raise ValueError(f"intensity must be at least 0 and period_s positive, not {intensity} and {period_s}")
        self.intensity = intensity
        self.period_s = period_s
        self._backoff = backoff
        self._cell: Cell | None = None
        self._nursery: trio.Nursery | None = None
        self._context = contextvars.Context()

    async def _run(self, cell: Cell) -> None:
        if self._nursery is not None:
            raise RuntimeError(f"{cell.label} runs already as {self._down().name}")
        self._cell = cell
        self._context = contextvars.copy_context()
        async with open_hidden_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._start_all()
                cell.mark_started()
                await self._watch()
            finally:
                self._nursery = None
                await self._stop_all()

    async def _start_all(self) -> None:
        """Starts the children of the supervisor's declaration."""

    async def _watch(self) -> None:
        """Runs until the supervisor is cancelled, or raises when it gives up."""
        await trio.sleep_forever()

    async def _stop_all(self) -> None:
        raise NotImplementedError

    async def _launch(self, cell: Cell) -> None:
        """Starts a child. If the start fails, raises its error, and the child is completely removed."""
        nursery, parent = self._nursery, self._cell
        if nursery is None or parent is None:
            raise self._down()
        cell.prepare(parent, parent.runtime, nursery)
        self._context.run(partial(nursery.start_soon, self._keep, cell, parent, name=cell.path))
        try:
            await cell.start_finished.wait()
        except trio.Cancelled:
            if not cell.start_finished.is_set():
                cell.request_stop()
                await _wait_for([cell])
            raise
        if not cell.started_once:
            await cell.wait_ended()
            assert cell.start_error is not None
            raise cell.start_error

    def _down(self) -> ActorDown:
        cell = self._cell
        if cell is None:
            return ActorDown(self.kind, Exit(ExitKind.NOT_STARTED))
        return ActorDown(cell.label, cell.exit or Exit(ExitKind.STOPPED))

    async def _keep(self, cell: Cell, parent: Cell) -> None:
        try:
            while True:
                exit_ = await cell.incarnate()
                current_fence.set(parent.fence)
                if not cell.started_once or not self._should_restart(cell, exit_):
                    break
                window = self._window_of(cell)
                if not self._within_intensity(window):
                    await self._give_up(cell, exit_)
                    break
                await self._back_off(cell, len(window))
                if cell.stop_requested:
                    break
                cell.restarts += 1
        except BaseException as exc:
            cell.start_error = exc
            raise
        finally:
            self._ended(cell)

    async def _back_off(self, cell: Cell, restart: int) -> None:
        assert self._cell is not None
        with cell.pause(State.RESTARTING):
            await trio.sleep(self._backoff.delay_s(restart, self._cell.runtime.rng))

    def _within_intensity(self, window: list[float]) -> bool:
        """Counts a restart, and returns whether it is within the intensity. As in OTP the period includes both ends."""
        now = trio.current_time()
        window.append(now)
        while window[0] < now - self.period_s:
            del window[0]
        return len(window) <= self.intensity

    def _should_restart(self, cell: Cell, exit_: Exit) -> bool:
        return cell.restarts_after(exit_)

    def _window_of(self, cell: Cell) -> list[float]:
        if cell.window is None:
            cell.window = []
        return cell.window

    async def _give_up(self, cell: Cell, exit_: Exit) -> None:
        raise NotImplementedError

    def _ended(self, cell: Cell) -> None:
        exit_ = cell.exit or Exit(ExitKind.STOPPED)
        if not cell.started_once and cell.start_error is None:
            stopped = exit_.exception is None or cell.stop_requested
            cell.start_error = ActorDown(cell.path, exit_) if stopped else exit_.exception
        cell.finish()


@final
class Supervisor(_Supervisor):
    """Starts its children in order, restarts them by the strategy, and stops them in reverse.

    It stops them one after the other, each within its own `shutdown_s`, whatever scope around the tree is cancelled.
    After more than `intensity` restarts of all children together within `period_s` seconds, it stops them and fails
    with `TooManyRestarts`; then its own supervisor acts. If a child cannot start at first, neither can the supervisor.

    :raises NameTaken: two children have one name.
    :raises ValueError: an intensity or period is out of range.
    """

    kind = "supervisor"

    def __init__(
        self,
        strategy: Strategy = ONE_FOR_ONE,
        *,
        intensity: int = 3,
        period_s: float = 30.0,
        children: Iterable[Child[Any]],
        backoff: Backoff = Backoff(),  # frozen
    ) -> None:
        super().__init__(intensity, period_s, backoff)
        self.strategy = strategy
        self._cells = [child._cell for child in children]
        names = [cell.child.name for cell in self._cells]
        for name in names:
            if names.count(name) > 1:
                raise NameTaken(f"two children are called {name}")
        self._window: list[float] = []
        self._failure: TooManyRestarts | None = None
        self._failed: list[Cell] = []
        self._wake = trio.Event()

    def _children(self) -> Sequence[Cell]:
        return self._cells

    def _budget_s(self) -> float:
        return sum(cell.shutdown_s + _GRACE_S for cell in self._cells)

    def statistics(self) -> dict[str, Any]:
        return {"strategy": self.strategy.value, "intensity": self.intensity, "period_s": self.period_s}

    async def _start_all(self) -> None:
        self._failure = None
        self._failed.clear()
        self._window.clear()
        self._wake = trio.Event()
        for cell in self._cells:
            await self._launch(cell)

    async def _stop_all(self) -> None:
        for cell in reversed(self._cells):
            cell.request_stop()
            await _wait_for([cell])

    async def _watch(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._failure is not None:
                raise self._failure
            while self._failed:
                await self._restart_group()

    async def _restart_group(self) -> None:
        """Stops the affected children in reverse, and starts them again in order until one start fails.

        A child that fails meanwhile is in `_failed` again, and so is the first that was not started. The lowest of them
        decides which children are affected next, so none is forgotten.
        """
        cause = self._failed[0]
        lowest = min(self._cells.index(cell) for cell in self._failed)
        self._failed.clear()
        if not self._within_intensity(self._window):
            raise self._too_many(cause, cause.exit or Exit(ExitKind.STOPPED))
        affected = self._cells if self.strategy is ONE_FOR_ALL else self._cells[lowest:]
        for cell in reversed(affected):
            cell.request_stop()
            await _wait_for([cell])
        self._failed = [cell for cell in self._failed if cell not in affected]
        assert self._cell is not None
        await trio.sleep(self._backoff.delay_s(len(self._window), self._cell.runtime.rng))
        for cell in affected:
            if self._failed:
                self._failed.append(cell)
                return
            if cell.child.restart is TEMPORARY:
                continue
            cell.restarts += 1
            try:
                await self._launch(cell)
            except Exception as exc:
                _logger.warning("%s could not be restarted", cell.path, exc_info=exc)
                self._failed.append(cell)

    def _should_restart(self, cell: Cell, exit_: Exit) -> bool:
        wanted = cell.restarts_after(exit_)
        if wanted and self.strategy is not ONE_FOR_ONE:
            self._failed.append(cell)
            self._wake.set()
            return False
        return wanted

    def _window_of(self, cell: Cell) -> list[float]:
        return self._window

    async def _give_up(self, cell: Cell, exit_: Exit) -> None:
        if self._failure is None:
            self._failure = self._too_many(cell, exit_)
        self._wake.set()

    def _too_many(self, cell: Cell, exit_: Exit) -> TooManyRestarts:
        error = TooManyRestarts(cell.path, self.intensity, self.period_s, exit_)
        error.__cause__ = exit_.exception
        return error


@final
class DynamicSupervisor(_Supervisor):
    """Starts and stops children while it runs. Pass it to the code that starts them.

    The intensity counts per child, and is never escalated. A child that crashes more than `intensity` times within
    `period_s` is given up: `gave_up` is called with a `GaveUp`, then the name is free. No other child notices.
    `gave_up` may be async, with `gave_up_timeout_s` to finish, or the `tell` of an actor's ref.

    Its children stop all at once, the youngest first, since none depends on another.
    """

    kind = "dynamic supervisor"

    def __init__(
        self,
        *,
        intensity: int = 3,
        period_s: float = 60.0,
        gave_up: Callable[[GaveUp], Awaitable[None] | None] | None = None,
        gave_up_timeout_s: float = 30.0,
        backoff: Backoff = Backoff(),  # frozen
    ) -> None:
        super().__init__(intensity, period_s, backoff)
        self._gave_up = gave_up
        self._gave_up_timeout_s = gave_up_timeout_s
        self._cells: dict[str, Cell] = {}
        self._given_up: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._given_up_total = 0

    def _children(self) -> Sequence[Cell]:
        return list(self._cells.values())

    def _budget_s(self) -> float:
        return max((cell.shutdown_s for cell in self._cells.values()), default=0.0) + _GRACE_S

    def statistics(self) -> dict[str, Any]:
        return {
            "intensity": self.intensity,
            "period_s": self.period_s,
            "given_up_total": self._given_up_total,
            "given_up": list(self._given_up),
        }

    @overload
    async def start_child(self, child: Child[A]) -> Ref[A]: ...
    @overload
    async def start_child(self, child: Child[None]) -> None: ...
    async def start_child(self, child: Child[Any]) -> Ref[Any] | None:
        """Starts a child, and returns once it has started: the ref of an actor, otherwise None.

        It raises what the child raises before it has started. Then, or when the caller is cancelled first, nothing of
        the child is left.

        :raises NameTaken: the supervisor has a child of that name.
        :raises StartTimeout: the start took longer than the child's `start_timeout_s`.
        :raises ActorDown: this supervisor does not run, or the child was stopped while it started.
        :raises Fenced: the caller counts as killed; see `check_fence`.
        """
        check_fence()
        cell = child._cell
        if self._nursery is None or (self._cell is not None and self._cell.stop_requested):
            raise self._down()
        if child.name in self._cells:
            raise NameTaken(f"a child of {self._path} is already called {child.name}")
        if cell.alive:
            raise RuntimeError(f"{cell.path} runs already; one Child cannot be in two places")
        self._cells[child.name] = cell
        await self._launch(cell)
        return cell.ref

    async def stop_child(self, name: str) -> None:
        """Stops a child and waits until it is completely removed. Its name is then free.

        That takes the child's `shutdown_s` at most, unless it shields itself for longer.

        :raises NoSuchChild: the supervisor has no child of that name.
        :raises Fenced: the caller counts as killed; see `check_fence`.
        """
        check_fence()
        cell = self._cells.get(name)
        if cell is None:
            raise NoSuchChild(f"{self._path} has no child called {name}")
        cell.request_stop()
        await cell.wait_ended()

    @property
    def names(self) -> list[str]:
        """The names of the children, in the order of their start."""
        return list(self._cells)

    @property
    def _path(self) -> str:
        return self.kind if self._cell is None else self._cell.label

    async def _stop_all(self) -> None:
        cells = list(reversed(self._cells.values()))
        for cell in cells:
            cell.request_stop()
        await _wait_for(cells)

    async def _give_up(self, cell: Cell, exit_: Exit) -> None:
        _logger.error("%s is given up: more than %d restarts in %g s", cell.path, self.intensity, self.period_s)
        self._given_up_total += 1
        self._given_up.append({"name": cell.child.name, "at_s": cell.since_start(), "reason": str(exit_)})
        scope = cell.pause(State.GIVING_UP)
        if self._gave_up is None:
            return
        scope.deadline = trio.current_time() + self._gave_up_timeout_s
        with scope:
            try:
                pending = self._gave_up(GaveUp(cell.child.name, exit_))
                if inspect.isawaitable(pending):
                    await pending
            except Exception:
                _logger.exception("%s is given up, but the callback failed", cell.path)
        if scope.cancelled_caught:
            _logger.error("%s is given up, but the callback took longer than its timeout", cell.path)

    def _ended(self, cell: Cell) -> None:
        if self._cells.get(cell.child.name) is cell:
            del self._cells[cell.child.name]
        super()._ended(cell)


async def _wait_for(cells: Sequence[Cell]) -> None:
    """Waits, shielded, until all have ended or the longest of their budgets is spent."""
    budget_s = max((cell.shutdown_s for cell in cells if cell.alive), default=0.0) + _GRACE_S
    with trio.CancelScope(shield=True, deadline=trio.current_time() + budget_s):
        for cell in cells:
            if cell.alive:
                await cell.wait_ended()
    for cell in cells:
        if cell.alive:
            _logger.error("%s has not ended within its budget, and nothing can force it", cell.path)
