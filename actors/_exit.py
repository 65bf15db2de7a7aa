"""How an incarnation ends, and what is left of an exception once the nurseries have wrapped it.

Every nursery wraps what passes through it once more, so a `ValueError` in a task of a task of an actor arrives as
a group in a group. Whoever reads a reason wants the `ValueError`. It is unwrapped here, once, at the edge of the
incarnation, and nowhere else. `trio.Cancelled` is never a reason: it says that somebody else had one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import trio


class ExitKind(enum.StrEnum):
    """What kind of end an incarnation came to."""

    UNBORN = "not started"
    """There has been no incarnation yet."""
    NORMAL = "finished"
    """It ended by itself, with nothing to complain about."""
    STOPPED = "stopped"
    """Its supervisor, or the end of the system, asked it to stop. Whatever it raised while stopping is no crash."""
    CRASHED = "crashed"
    """An exception that nobody had asked for."""
    KILLED = "killed"
    """`System.kill`, the simulated `kill -9`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The reason why an incarnation ended; `exception` is unwrapped from the groups that nurseries put round it."""

    kind: ExitKind
    exception: BaseException | None = None

    @property
    def abnormal(self) -> bool:
        """Whether a `TRANSIENT` child is started again after this."""
        return self.kind in (ExitKind.CRASHED, ExitKind.KILLED)

    def __str__(self) -> str:
        if self.exception is None:
            return self.kind.value
        text = str(self.exception)
        name = type(self.exception).__name__
        return f"{self.kind.value}: {name}: {text}" if text else f"{self.kind.value}: {name}"


def flatten(exc: BaseException | None) -> BaseException | None:
    """What `exc` is about, without groups and without `trio.Cancelled`; None when nothing else is in it.

    One exception comes back as itself, several as one flat group. One that is no `Exception` (such as
    `KeyboardInterrupt`) comes before all others and alone.
    """
    if exc is None:
        return None
    leaves = [leaf for leaf in _leaves(exc) if not isinstance(leaf, trio.Cancelled)]
    if not leaves:
        return None
    failures = []
    for leaf in leaves:
        if not isinstance(leaf, Exception):
            return leaf
        failures.append(leaf)
    return failures[0] if len(failures) == 1 else ExceptionGroup("several failures", failures)


def cancelled_part(exc: BaseException | None) -> BaseException | None:
    """What of `exc` is cancellation and has to travel on to the scope that asked for it."""
    if isinstance(exc, trio.Cancelled):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        return exc.subgroup(trio.Cancelled)
    return None


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
