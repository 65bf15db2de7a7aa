"""Progress bars of copies and of transfers by the daemon."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._output import Output

_BAR_FROM = 1024 * 1024


class Bar:
    """Counts copied bytes; draws a bar only on a terminal."""

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None

    def add(self, count: int) -> None:
        """Adds to the count of bytes."""
        self.done += count


@contextmanager
def progress(out: Output) -> Iterator[Bar]:
    """Shows a bar on standard error, for the length of a block."""
    if out.json or not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        console=Console(stderr=True), transient=True,
    ) as drawn:  # fmt: skip
        task = drawn.add_task("", total=None, visible=False)

        class Drawn(Bar):
            def add(self, count: int) -> None:
                super().add(count)
                # A small file is copied before anyone could read a bar.
                drawn.update(task, completed=self.done, total=self.total, visible=self.done > _BAR_FROM)

        yield Drawn()


@contextmanager
def described_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that draws a bar on standard error: with a text, the completed bytes, and all bytes, 0 if
    unknown. There is no bar before its first call."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("", total=None, visible=False)

        def draw(text: str, done: int, total: int) -> None:
            drawn.update(task, description=escape(text), completed=done, total=total or None, visible=True)

        yield draw
