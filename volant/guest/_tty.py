"""Pseudo-terminals with ioctl: Debian's Python has `termios` in a shared library, which the image lacks."""

from __future__ import annotations

import fcntl
import os
import struct
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TCGETS = 0x5401
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_ICANON = 0o2
_VEOF = 4
_TERMIOS = struct.Struct("=4IB19s")
_LOCAL_FLAGS = 3
_CHARACTERS = 5

become_controlling: Callable[[], object] = partial(fcntl.ioctl, 0, _TIOCSCTTY, 0)
"""Makes standard input the controlling terminal of the caller's session. It is for a child between fork and exec: as
one call of a C function, it needs no lock that another thread may hold."""


def open_terminal(rows: int, cols: int) -> tuple[int, int]:
    """Returns both ends of a new pseudo-terminal: this side's, which does not block, and the command's."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    resize(ours, rows, cols)
    return ours, theirs


def resize(ours: int, rows: int, cols: int) -> None:
    """Sets the size; the kernel sends SIGWINCH to the foreground programs."""
    fcntl.ioctl(ours, _TIOCSWINSZ, struct.pack("=4H", rows, cols, 0, 0))


def end_of_input(ours: int, *, in_a_line: bool) -> bytes:
    """Returns the characters that end the input as if typed (VEOF); empty if the terminal is not in line mode.

    :param in_a_line: whether a line was begun; the first VEOF then only delivers it, and a second one ends the input
    """
    found = _TERMIOS.unpack(fcntl.ioctl(ours, _TCGETS, bytes(_TERMIOS.size)))
    if not found[_LOCAL_FLAGS] & _ICANON:
        return b""
    character: bytes = found[_CHARACTERS][_VEOF : _VEOF + 1]
    return character * 2 if in_a_line else character
