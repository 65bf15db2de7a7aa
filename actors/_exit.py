"""Ends of incarnations, and the exception groups that they leave behind."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio


class ExitKind(enum.StrEnum):
    """The way in which an incarnation ended."""

    NOT_STARTED = "not started"
    """There has been no incarnation yet."""
    NORMAL = "finished"
    """It ended by itself, without an exception."""
    STOPPED = "stopped"
    """Its supervisor, or the end of the system, stopped it. Errors that it raises while it stops are no crash."""
    CRASHED = "crashed"
    """It raised an exception."""
    KILLED = "killed"
    """`actors.testing.kill`, the simulated `kill -9`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of an incarnation. `exception` is the error that it raised; a group keeps its shape, without
    `trio.Cancelled`."""

    kind: ExitKind
    exception: BaseException | None = None

    @property
    def abnormal(self) -> bool:
        """Whether a `TRANSIENT` child restarts after this."""
        return self.kind in (ExitKind.CRASHED, ExitKind.KILLED)

    def __str__(self) -> str:
        return self.kind.value if self.exception is None else f"{self.kind.value}: {_describe(self.exception)}"


def split_cancelled(exc: BaseException | None) -> tuple[BaseException | None, BaseException | None]:
    """Returns the part of `exc` that is a failure and the part that is cancellation. Both keep the shape of groups.

    `trio.Cancelled` is no reason for an end: it has to reach the scope that was cancelled.
    """
    if isinstance(exc, BaseExceptionGroup):
        cancelled, failure = exc.split(trio.Cancelled)
        return failure, cancelled
    return (None, exc) if isinstance(exc, trio.Cancelled) else (exc, None)


@asynccontextmanager
async def open_hidden_nursery() -> AsyncIterator[trio.Nursery]:
    """Opens a nursery that is an implementation detail: it wraps no exception that is alone in it.

    So an exception of the block comes out as it is, a group of the caller's as well. Several failures come out in the
    nursery's group.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        error = group.exceptions[0]
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # not the nursery's group
            del error  # in its own traceback


def _describe(exc: BaseException) -> str:
    name = type(exc).__name__
    if isinstance(exc, BaseExceptionGroup):
        return f"{name}({', '.join(map(_describe, exc.exceptions))})"
    text = str(exc)
    return f"{name}: {text}" if text else name
