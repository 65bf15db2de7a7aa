"""`SIGUSR1`: what every thread and every task is doing goes to the log, and the daemon goes on.

The threads come first, on standard error and from the signal's own handler: that works, too, while the event loop
hangs, and then shows where. The tasks follow, once the loop turns. Both say where, and never what a variable holds.

The handler is one of Python's, and runs between two of its instructions. One of the C library's
(`faulthandler.register`) would show more of a daemon that hangs in C, and reads frames that are half made: it has ended
a daemon. Such a hang shows itself when the watchdog ends it (`faulthandler.enable`).
"""

from __future__ import annotations

import faulthandler
import logging
import signal
from collections.abc import Iterator
from types import FrameType

import trio

from volant.concurrency import dump_tasks

_logger = logging.getLogger("volant.tasks")
# Somebody has asked for it, whatever else is logged.
_logger.setLevel(logging.INFO)

_ENTRY_CHARACTERS = 16 * 1024
"""Of UTF-8's at most three bytes: an entry of systemd's journal is cut at 48 KiB."""
_STDERR = 2


def before() -> None:
    """Until the daemon listens to the signal, it must not end of it; and what ends it shows where each thread was."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    faulthandler.enable()


async def dump_on_signal() -> None:
    """Answers each signal, for as long as it runs."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        wake = signal.getsignal(signal.SIGUSR1)
        assert callable(wake)

        def show(number: int, frame: FrameType | None) -> None:
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            wake(number, frame)

        # Until the receiver goes, which puts back what was there before it.
        signal.signal(signal.SIGUSR1, show)
        async for _ in signals:
            for text in _pieces(dump_tasks().splitlines()):
                _logger.info("what all tasks do:\n%s", text)


def _pieces(lines: list[str]) -> Iterator[str]:
    """Whole lines, in pieces that a log takes."""
    piece: list[str] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > _ENTRY_CHARACTERS:
            yield "\n".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line) + 1
    yield "\n".join(piece)
