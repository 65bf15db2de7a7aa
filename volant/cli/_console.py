"""`volar vms console`: connects the terminal to a VM's serial console.

The terminal is raw during the session, so that Ctrl-C, Tab and Ctrl-D reach the guest. It is restored however the
session ends, also by a signal that can be caught. Ctrl-] ends the session, as in telnet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import click
import trio

from volant.client import ConnectionLost, Console, ConsoleGap, Reconnected

from ._events import retrying
from ._output import Output
from ._streaming import Session, command
from ._terminal import ENDINGS, Escape, raw, read_input, write_output, written
from ._text import safe
from ._vms_group import name_argument

_INTERRUPT = 0x03
_BELL = b"\a"


@command(None, "console")
@name_argument
@click.option("--read-only", is_flag=True, help="Watch without typing.")
@click.option("--take", is_flag=True, help="Disconnect the client that may type.")
@click.option("--tail", type=click.IntRange(0, 1000), help="Start with this many lines; default 25.")
@click.option("--escape", type=Escape(), default="^]", show_default=True, help="The key that disconnects, or none.")
async def console(
    session: Session, name: str, read_only: bool, take: bool, tail: int | None, escape: int
) -> int | None:
    """Connect to the serial console of a VM; Ctrl-] disconnects.

    Press Enter for the guest's shell. All keys go to the guest, including Ctrl-C. Many clients may watch (--read-only),
    but only one may type. If the connection is lost, for example because the daemon restarts, volar reconnects. If
    standard input is not a terminal, its content is typed, and the console is shown until the VM is down.
    """
    if read_only and take:
        raise click.UsageError("--read-only and --take exclude each other")
    messages = _Messages(session.out)
    async with session.client.vms.console(
        name, write=not read_only, take=take, tail=tail, on_retry=messages.on_retry
    ) as line:
        terminal = sys.stdin.isatty()
        if terminal:
            leave = f"{written(escape)} leaves" if escape >= 0 else "no key leaves"
            hint = "" if read_only else ", Enter starts the guest's shell"
            messages.send(f"connected to the console of {name}; {leave}{hint}")
        with _raw(sys.stdin.fileno(), messages) if terminal else nullcontext():
            code = await _connect(line, messages, terminal=terminal, read_only=read_only, escape=escape)
    if line.end:
        messages.send(line.end)
    return code


async def _connect(line: Console, messages: _Messages, *, terminal: bool, read_only: bool, escape: int) -> int:
    """Passes bytes on until the console ends, the escape key, or a signal; returns the exit code."""
    code = 0
    with trio.open_signal_receiver(*ENDINGS) as signals:
        async with trio.open_nursery() as nursery:

            async def ending() -> None:
                nonlocal code
                async for number in signals:
                    code = 128 + number
                    nursery.cancel_scope.cancel()

            async def typing() -> None:
                if terminal:
                    await _type(line, None if read_only else line, escape)
                    nursery.cancel_scope.cancel()
                elif not read_only:
                    await _type(line, line, -1)

            nursery.start_soon(ending)
            nursery.start_soon(typing)
            await _show(line, messages)
            nursery.cancel_scope.cancel()
    return code


async def _show(line: Console, messages: _Messages) -> None:
    async for piece in line:
        if isinstance(piece, bytes):
            await write_output(piece)
        elif isinstance(piece, ConsoleGap):
            messages.send(f"this terminal is too slow: {piece.missed} bytes are lost")
        elif isinstance(piece, Reconnected):
            messages.send("connected again; `volar vms logs` has the output in between")


async def _type(line: Console, to: Console | None, escape: int) -> None:
    """Types the input until its end or the escape key. In a read-only terminal, Ctrl-C also ends it."""
    while data := await read_input():
        at = data.find(escape) if escape >= 0 else -1
        if to is None and _INTERRUPT in data and escape >= 0:
            return
        if at >= 0:
            data = data[:at]
        if data and to is not None:
            try:
                await line.send(data)
            except ConnectionLost:
                if not sys.stdin.isatty():
                    raise  # Input from a pipe can't be typed again.
                await write_output(_BELL)
        if at >= 0:
            return


class _Messages:
    """The messages of `volar` itself, on standard error, separate from the guest's output."""

    def __init__(self, out: Output) -> None:
        self.raw = False
        self._out = out
        self.on_retry = retrying(self.note)

    def send(self, text: str) -> None:
        self.note(f"volar: {text}")

    def note(self, text: str) -> None:
        if self._out.json:
            return
        if self.raw:
            # The guest's line may be unfinished, and in a raw terminal a line feed does not return to the first column.
            sys.stderr.write(f"\r\n{safe(text)}\r\n")
            sys.stderr.flush()
        else:
            self._out.note(text)


@contextmanager
def _raw(fd: int, messages: _Messages) -> Iterator[None]:
    with raw(fd):
        messages.raw = True
        try:
            yield
        finally:
            messages.raw = False
