"""The user's terminal: raw while a program in a VM uses it, and always restored."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import click
import trio

from ._streams import OutputError

PIECE = 4096
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""Signals to catch, so that the terminal is restored first."""


class Escape(click.ParamType[int]):
    """Converts a control character such as `^]` to its code, `none` to -1."""

    name = "^char"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value)
        if text == "none":
            return -1
        if len(text) != 2 or text[0] != "^" or not "@" <= text[1].upper() <= "_":
            self.fail(f"{text!r} is no control character such as ^], nor none", param, ctx)
        return ord(text[1].upper()) - 64


def written(code: int) -> str:
    """Returns the name of a control character's key."""
    return f"Ctrl-{chr(code + 64)}"


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Makes a terminal raw for the block: each key is read as its bytes."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


async def read_input(size: int = PIECE) -> bytes:
    """Reads from standard input; returns nothing at its end."""
    fd = sys.stdin.fileno()
    try:
        await trio.lowlevel.wait_readable(fd)
    except PermissionError:
        # A regular file can't be waited for, and is always readable.
        await trio.lowlevel.checkpoint()
    return os.read(fd, size)


async def write_output(data: bytes, fd: int | None = None) -> None:
    """Writes to standard output, or another descriptor, and waits while its reader is slow."""
    fd = sys.stdout.fileno() if fd is None else fd
    view = memoryview(data)
    while view:
        try:
            await trio.lowlevel.wait_writable(fd)
        except PermissionError:
            await trio.lowlevel.checkpoint()
        try:
            view = view[os.write(fd, view[:PIECE]) :]
        except OSError as error:
            raise OutputError(fd, error) from None
