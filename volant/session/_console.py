"""Carries the serial console of one boot into the VM's log.

QEMU appends the console to a file, so no byte is lost while no daemon runs. The pump follows the file by inotify, cuts
it into lines and appends these to the log, each with the position after it: so an incarnation that takes over neither
loses a line nor logs one twice.

The file must not grow for ever. Truncating it would race with QEMU's next write, so what has been logged is freed by
punching a hole: positions stay the same, and the disk gets the space back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio

from volant.host import Host
from volant.logs import LogEntry, VmLog

from ._lines import PIECE_BYTES, Line, LineSplitter, piece_of

BEHIND_BYTES = 64 * 1024 * 1024
"""Maximum lead of a guest over the pump: about what its log keeps. It bounds what the console takes of the disk, and
how long the next daemon needs to catch up."""
FINISH_S = 3.0
_FINISH_BYTES = 64 * 1024
_PUNCH_BYTES = 1024 * 1024
_FAR_BYTES = 1 << 50


def console_source(boot_key: str) -> str:
    """Returns the source that the lines of one boot's console have in the VM's log."""
    return f"{boot_key}/console"


class ConsolePump:
    """Carries one console. Use as a context manager."""

    def __init__(
        self, host: Host, path: Path, log: VmLog, boot_key: str, *, feed: Callable[[bytes], None] | None = None
    ) -> None:
        """`feed` gets every piece, after its lines have been logged."""
        self._host = host
        self._feed = feed
        self._path = path
        self._log = log
        self._source = console_source(boot_key)
        self._splitter = LineSplitter(log.resume_position(self._source))
        self._freed = 0
        self._fd = -1

    def __enter__(self) -> ConsolePump:
        """:raises OSError: there is no console file."""
        self._fd = self._host.descriptors.open(self._path, os.O_RDWR)
        return self

    def __exit__(self, *exc: object) -> None:
        self._host.descriptors.close(self._fd)

    async def follow(self) -> None:
        """Carries what is written until cancelled."""
        with self._host.watches.open(self._path) as watch:
            while True:
                await self.drain()
                self._reclaim()
                await watch.wait()

    async def drain(self) -> None:
        """Carries the present output, at the rate that the log allows, so that a flood delays no other VM."""
        while piece := self._carry():
            await self._log.throttle(*piece)

    def recent(self, lines: int) -> bytes:
        """Returns the last lines of this boot, and the unfinished one, such as a prompt."""
        if not lines:
            return b""
        logged = self._log.tail_lines(lines, source=self._source)
        return "".join(f"{line}\r\n" for line in logged).encode() + self._splitter.held

    async def finish(self) -> None:
        """Carries the rest after the last write, as far as `FINISH_S` allows, and then only the end of it."""
        with trio.move_on_after(FINISH_S):
            await self.drain()
        self._skip(_FINISH_BYTES, _FINISH_BYTES)
        while self._carry():
            await trio.lowlevel.checkpoint()
        self._append(self._splitter.flush())

    def _carry(self) -> tuple[int, int] | None:
        """Carries a piece, and returns its numbers of lines and bytes, None if there is no more."""
        data = self._host.descriptors.read_at(self._fd, PIECE_BYTES, self._splitter.position)
        if not data:
            return None
        if len(data) == PIECE_BYTES and self._skip(BEHIND_BYTES, BEHIND_BYTES // 2):
            return 1, 0
        data = piece_of(data)
        lines = self._splitter.feed(data)
        self._append(lines)
        if lines and lines[-1].end - self._freed >= _PUNCH_BYTES:
            # Lines that the log has not synced may be freed: a power cut ends the VM and its console with them.
            self._host.descriptors.punch_hole(self._fd, 0, lines[-1].end)
            self._freed = lines[-1].end
            self._reclaim()
        if self._feed is not None:
            self._feed(data)
        return len(lines), len(data)

    def _skip(self, limit: int, keep: int) -> bool:
        """Gives up all but the last `keep` bytes, when more than `limit` are not carried yet. Whether it did."""
        try:
            end = self._host.files.size(self._path)
        except OSError:
            return False
        lost = end - keep - self._splitter.position
        if end - self._splitter.position <= limit:
            return False
        notice = b"[%d bytes of the console are lost]" % lost
        self._append([*self._splitter.skip_to(end - keep), Line(notice, False, end - keep)])
        if self._feed is not None:
            self._feed(b"\r\n%b\r\n" % notice)
        self._host.descriptors.punch_hole(self._fd, 0, end - keep)
        self._freed = end - keep
        return True

    def _reclaim(self) -> None:
        """Frees space that contains no lines to carry: before the freed position, and beyond the end. Only a hypervisor
        that was taken over uses such space."""
        try:
            end = self._host.files.size(self._path)
        except OSError:
            return
        if self._host.disk.used(self._path) > max(0, end - self._freed) + BEHIND_BYTES:
            self._host.descriptors.punch_hole(self._fd, 0, self._freed)
            self._host.descriptors.punch_hole(self._fd, end, _FAR_BYTES)

    def _append(self, lines: list[Line]) -> None:
        if lines:
            now = self._host.clock.now()
            self._log.append(
                [
                    LogEntry(
                        stream="console",
                        line=line.data,
                        timestamp=now,
                        partial=line.partial,
                        source=self._source,
                        position=line.end,
                    )
                    for line in lines
                ]
            )
