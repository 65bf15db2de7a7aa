"""Cuts a stream of bytes into lines, with bounded memory and exact positions."""

from __future__ import annotations

from typing import NamedTuple

from volant.logs import MAX_LINE_BYTES
from volant.model import utf8_boundary

PIECE_BYTES = 64 * 1024
_PIECE_LINES = 2000


def piece_of(data: bytes, start: int = 0) -> bytes:
    """Returns the next part of `data` to carry, from `start` on: all of it, unless that would block the event loop."""
    if len(data) - start > PIECE_BYTES or data.count(b"\n", start) > _PIECE_LINES:
        end = start + PIECE_BYTES
        return data[start : end if data.count(b"\n", start, end) <= _PIECE_LINES else start + _PIECE_LINES]
    return data[start:] if start else data


class Line(NamedTuple):
    """A complete line, an unfinished one, or a part of a line that is too long."""

    data: bytes
    partial: bool
    """Whether the line continues in the next one."""
    end: int
    """The position in the stream after this line."""


class LineSplitter:
    """Cuts a stream into lines at LF. A CR before it goes too, as serial consoles send both.

    `position` is that of the next byte to be fed. An unfinished line is held, at most `MAX_LINE_BYTES` of it: a reader
    that resumes at the `end` of the last line it has seen gets the rest again, and nothing twice.
    """

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self._rest = bytearray()

    @property
    def held(self) -> bytes:
        """The unfinished line."""
        return bytes(self._rest)

    def feed(self, data: bytes) -> list[Line]:
        """Takes the next bytes, and returns the lines that they finish."""
        lines: list[Line] = []
        start = self.position - len(self._rest)
        self.position += len(data)
        self._rest += data
        begin = 0
        while True:
            stop = self._rest.find(b"\n", begin, begin + MAX_LINE_BYTES + 2)
            if stop >= 0:
                end = stop + 1
                if stop > begin and self._rest[stop - 1] == 0x0D:
                    stop -= 1
                lines.append(Line(bytes(self._rest[begin:stop]), False, start + end))
                begin = end
            elif len(self._rest) - begin >= MAX_LINE_BYTES + 2:
                cut = utf8_boundary(self._rest, begin + MAX_LINE_BYTES, begin)
                lines.append(Line(bytes(self._rest[begin:cut]), True, start + cut))
                begin = cut
            else:
                break
        del self._rest[:begin]
        return lines

    def flush(self) -> list[Line]:
        """Returns the unfinished line, as the stream ends or has a gap here."""
        if not self._rest:
            return []
        line = Line(bytes(self._rest).removesuffix(b"\r"), False, self.position)
        self._rest.clear()
        return [line]

    def skip_to(self, position: int) -> list[Line]:
        """Continues at `position` after missing bytes. Returns the unfinished line."""
        lines = self.flush()
        self.position = position
        return lines
