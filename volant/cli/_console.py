"""`volar vms console`: a terminal at a VM's serial console.

The terminal is raw while it lasts, so that Ctrl-C, Tab and Ctrl-D reach the guest, and is put back however that ends, a
signal that can be caught included. One key leaves: Ctrl-], as of old.
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
@click.option("--take", is_flag=True, help="Take the keyboard from the client that has it.")
@click.option("--tail", type=click.IntRange(0, 1000), help="Start with this many lines; default 25.")
@click.option("--escape", type=Escape(), default="^]", show_default=True, help="The key that leaves, or none.")
async def console(
    session: Session, name: str, read_only: bool, take: bool, tail: int | None, escape: int
) -> int | None:
    """Connect to the serial console of a VM; Ctrl-] leaves.

    Press Enter for the guest's shell. What is typed goes to the guest, Ctrl-C too; many may look on (--read-only), one
    types. A connection that is lost, for instance as the daemon is restarted, is made again. Where standard input is no
    terminal, what it has is typed, and then the console is shown until the VM is down.
    """
    if read_only and take:
        raise click.UsageError("--read-only and --take exclude each other")
    words = _Words(session.out)
    async with session.client.vms.console(
        name, write=not read_only, take=take, tail=tail, on_retry=words.on_retry
    ) as line:
        terminal = sys.stdin.isatty()
        if terminal:
            leave = f"{written(escape)} leaves" if escape >= 0 else "no key leaves"
            words.say(f"at the console of {name}; {leave}" + ("" if read_only else ", Enter wakes the guest's shell"))
        with _raw(sys.stdin.fileno(), words) if terminal else nullcontext():
            code = await _sit(line, words, terminal=terminal, read_only=read_only, escape=escape)
    if line.end:
        words.say(line.end)
    return code


async def _sit(line: Console, words: _Words, *, terminal: bool, read_only: bool, escape: int) -> int:
    """Until the console ends, the escape key, or a signal; the exit code."""
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
            await _show(line, words)
            nursery.cancel_scope.cancel()
    return code


async def _show(line: Console, words: _Words) -> None:
    async for piece in line:
        if isinstance(piece, bytes):
            await write_output(piece)
        elif isinstance(piece, ConsoleGap):
            words.say(f"this terminal is too slow: {piece.missed} bytes are lost")
        elif isinstance(piece, Reconnected):
            words.say("connected again; what was said meanwhile is in `volar vms logs`")


async def _type(line: Console, to: Console | None, escape: int) -> None:
    """Until the input is at its end, or the escape key; in a terminal where one only looks on, Ctrl-C too."""
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
                    raise  # Nobody could type it again.
                await write_output(_BELL)
        if at >= 0:
            return


class _Words:
    """What `volar` says itself meanwhile, on standard error, so that it can be told from what the guest says."""

    def __init__(self, out: Output) -> None:
        self.raw = False
        self._out = out
        self.on_retry = retrying(self.note)

    def say(self, text: str) -> None:
        self.note(f"volar: {text}")

    def note(self, text: str) -> None:
        if self._out.json:
            return
        if self.raw:
            # The guest's line may not be at its end, and a raw terminal takes a line feed for no more than that.
            sys.stderr.write(f"\r\n{safe(text)}\r\n")
            sys.stderr.flush()
        else:
            self._out.note(text)


@contextmanager
def _raw(fd: int, words: _Words) -> Iterator[None]:
    with raw(fd):
        words.raw = True
        try:
            yield
        finally:
            words.raw = False
