"""Logs the stacks of all threads and tasks on `SIGUSR1`; the daemon keeps running.

The signal's handler dumps the threads to standard error, which also works while the event loop hangs. The tasks follow
when the loop runs again. Neither shows values of variables.

The handler is a Python handler, which runs between two bytecodes. `faulthandler.register` would work while the daemon
hangs in C, but reads incomplete frames, which has crashed a daemon. Such a hang is shown when the watchdog ends the
daemon (`faulthandler.enable`).
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
# The dump was requested, so it is logged at any log level.
_logger.setLevel(logging.INFO)

_ENTRY_CHARACTERS = 16 * 1024
"""Maximum characters of a log entry. At three bytes each they fit: an entry of systemd's journal is cut at 48 KiB."""
_STDERR = 2


def before() -> None:
    """Ignores the signal until the daemon handles it, and dumps the threads if the process crashes."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    faulthandler.enable()


async def dump_on_signal() -> None:
    """Logs a dump for each signal, until cancelled."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        wake = signal.getsignal(signal.SIGUSR1)
        assert callable(wake)

        def show(number: int, frame: FrameType | None) -> None:
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            wake(number, frame)

        # The receiver restores the earlier handler when it closes.
        signal.signal(signal.SIGUSR1, show)
        async for _ in signals:
            for text in _pieces(dump_tasks().splitlines()):
                _logger.info("all tasks:\n%s", text)


def _pieces(lines: list[str]) -> Iterator[str]:
    """Yields the lines in pieces that fit into a log entry."""
    piece: list[str] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > _ENTRY_CHARACTERS:
            yield "\n".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line) + 1
    yield "\n".join(piece)
