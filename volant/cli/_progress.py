"""Progress bars of copies and of transfers by the daemon."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._output import Output

_BAR_FROM = 1024 * 1024

Draw = Callable[[str, int, int], None]
"""Draws a bar: with a text, the completed bytes, and all bytes, 0 if unknown."""


class Bar:
    """Counts copied bytes, and draws them on a terminal."""

    def __init__(self, draw: Draw | None = None) -> None:
        self.done = 0
        self.total: int | None = None
        self._draw = draw

    def add(self, count: int) -> None:
        """Adds to the count of bytes."""
        self.done += count
        # A small file is copied before anyone could read a bar.
        if self._draw is not None and self.done > _BAR_FROM:
            self._draw("", self.done, self.total or 0)


@contextmanager
def progress(out: Output) -> Iterator[Bar]:
    """Yields the count of a copy, with a bar on standard error if that is a terminal."""
    if out.json or not sys.stderr.isatty():
        yield Bar()
        return
    with drawing() as draw:
        yield Bar(draw)


@contextmanager
def drawing() -> Iterator[Draw]:
    """Yields a function that draws a bar on standard error. There is no bar before its first call."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("", total=None, visible=False)

        def draw(text: str, done: int, total: int) -> None:
            drawn.update(task, description=escape(text), completed=done, total=total or None, visible=True)

        yield draw
