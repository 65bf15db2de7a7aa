"""From a stream of bytes to lines, with bounded memory and exact positions."""

from __future__ import annotations

from typing import NamedTuple

from volant.model import utf8_boundary

MAX_LINE_BYTES = 64 * 1024
"""Longer lines are split (contract: Logs)."""


PIECE_BYTES = 64 * 1024
_PIECE_LINES = 2000


def piece_of(data: bytes, start: int = 0) -> bytes:
    """What to take next of `data`, at its position `start`: all of it, unless that is too much for one turn."""
    if len(data) - start > PIECE_BYTES or data.count(b"\n", start) > _PIECE_LINES:
        end = start + PIECE_BYTES
        return data[start : end if data.count(b"\n", start, end) <= _PIECE_LINES else start + _PIECE_LINES]
    return data[start:] if start else data


class Line(NamedTuple):
    """A line without its end, or a part of one that is too long."""

    data: bytes
    partial: bool
    """More of the same line follows in the next one."""
    end: int
    """The position in the stream at which to go on after this line."""


class LineSplitter:
    """Cuts a stream into lines at LF; a CR before it goes too, as serial consoles send both.

    `position` is where the bytes that are fed next begin. What is not yet a line is held, at most `MAX_LINE_BYTES`;
    whoever resumes at the `end` of the last line that it has seen gets the rest again, and nothing twice.
    """

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self._rest = bytearray()

    @property
    def held(self) -> bytes:
        """What has come and is no line yet."""
        return bytes(self._rest)

    def feed(self, data: bytes) -> list[Line]:
        """Take the next bytes; return the lines that are whole now."""
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
        """The stream is over, or has a gap here: what is held becomes a line of its own."""
        if not self._rest:
            return []
        line = Line(bytes(self._rest).removesuffix(b"\r"), False, self.position)
        self._rest.clear()
        return [line]

    def skip_to(self, position: int) -> list[Line]:
        """Bytes are missing; go on at `position`. Returns what was held."""
        lines = self.flush()
        self.position = position
        return lines
