"""A person's terminal: raw while something in a VM has it, and put back however that ends."""

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
"""Signals that can be caught, so that the terminal is put back first."""


class Escape(click.ParamType[int]):
    """`^]`, a control character as people write it: its code; -1 for none."""

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
    """The key of a control character."""
    return f"Ctrl-{chr(code + 64)}"


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """While the block runs, every key is a byte for whoever reads."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


async def read_input(size: int = PIECE) -> bytes:
    """What standard input has next; empty at its end."""
    fd = sys.stdin.fileno()
    try:
        await trio.lowlevel.wait_readable(fd)
    except PermissionError:
        # A file can't be waited for, and need not be.
        await trio.lowlevel.checkpoint()
    return os.read(fd, size)


async def write_output(data: bytes, fd: int | None = None) -> None:
    """Write to standard output, or another descriptor, and wait for whoever reads it."""
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
