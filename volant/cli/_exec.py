"""`volar vms exec`: commands in a VM, in a terminal, through pipes, or detached."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import click
import trio

from volant.client import ConnectionLost, ExecEnd, ExecGap, ExecOutput, ExecSession
from volant.model import LogRange

from ._guest import START_S, once_running
from ._run import NOT_RUN, TIMED_OUT, Duration, Failure, Passing
from ._streaming import Session, command
from ._terminal import ENDINGS, Escape, raw, read_input, write_output
from ._text import safe
from ._variables import env_file_option, env_option, variables
from ._vms_group import name_argument

_NOT_FOUND_IN_GUEST = 127
_NOT_EXECUTABLE = 126
_PIECE = 64 * 1024


@command(
    None,
    "exec",
    cls=Passing,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
    no_args_is_help=True,
)
@name_argument
@click.argument("words", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Send standard input to the command.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Leave the command running, and print its id for --attach.")
@click.option("--attach", metavar="ID", help="Attach to a detached command instead of starting COMMAND.")
@click.option("--from", "position", type=click.IntRange(min=0), help="With --attach: skip this many bytes of output.")
@click.option("--escape", type=Escape(), default="^]", show_default=True, help="The key that detaches, or none.")
@env_option
@env_file_option
@click.option("-w", "--workdir", "--cwd", "cwd", metavar="DIR", help="The working directory.")
@click.option("-u", "--user", help="A name or number in the guest, optionally with :GROUP.")
@click.option(
    "--timeout",
    type=Duration(),
    help="Kill the command after this time: 500ms, 10s, 2m, … Also limits the wait for a VM that is starting (60s).",
)
async def exec_(
    session: Session,
    name: str,
    words: tuple[str, ...],
    interactive: bool,
    tty: bool,
    detach: bool,
    attach: str | None,
    position: int | None,
    escape: int,
    env: tuple[str, ...],
    env_files: tuple[Path, ...],
    cwd: str | None,
    user: str | None,
    timeout: float | None,
) -> int:
    """Run a command in a VM; put options before NAME. Use -it for a shell.

    If the VM is starting, volar waits for it. Output is passed on byte for byte. Without -i the command has no standard
    input; -i together with -t needs a terminal. When volar ends, the command is killed, unless it is detached. The exit
    code is the command's, 128 + n if signal n ended it, 124 after --timeout, 126 or 127 if it can't be executed or does
    not exist, 125 if volar or the daemon failed.
    """
    words = words[1:] if words[:1] == ("--",) else words
    if attach is not None:
        if words or tty or detach or env or env_files or cwd or user or timeout:
            raise click.UsageError("--attach allows only -i, --from and --escape: the command runs already")

        async def attached() -> int:
            async with session.client.vms.attach(name, attach, position=position) as process:
                if process.tty and interactive:
                    need_terminal()
                # In a terminal, input is passed on without -i.
                typing = interactive or (process.tty and sys.stdin.isatty())
                return await _talk(session, name, process, typing, escape)

        return await once_running(session, name, attached)
    if position is not None:
        raise click.UsageError("--from needs --attach")
    if not words:
        raise click.UsageError("give a command after the name of the VM")
    if words[0].startswith("-"):
        raise click.UsageError(f"put options before the name of the VM; {words[0]!r} came after it")
    if tty and interactive and not detach:
        need_terminal()
    environ = variables(env, env_files)

    async def run() -> int:
        if not (interactive or tty or detach):
            async with session.client.vms.exec(
                name, words, env=environ, cwd=cwd, user=user, timeout_s=timeout
            ) as simple:
                async for piece in simple:
                    await _show(session, piece)
            assert simple.end is not None
            return exit_code(session, simple.end)
        if tty and os.environ.get("TERM"):
            environ.setdefault("TERM", os.environ["TERM"])
        rows, cols = terminal_size() or (24, 80)
        async with session.client.vms.exec_session(
            name,
            words,
            tty=tty,
            rows=rows,
            cols=cols,
            env=environ,
            cwd=cwd,
            user=user,
            timeout_s=timeout,
            detach=detach,
        ) as process:
            if detach:
                return await _detach(session, name, process, interactive)
            if not interactive and not tty:
                await process.send_eof()
            return await _talk(session, name, process, interactive, escape)

    return await once_running(session, name, run, START_S if timeout is None else timeout)


def need_terminal() -> None:
    """Checks that standard input is a terminal. Otherwise its end would be sent as Ctrl-D, which is lost if the guest
    does not read yet. :raises click.UsageError: it is no terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError(
            "-t with -i needs a terminal, and standard input is not one; leave out -t to pass on a pipe or a file"
        )


async def _detach(session: Session, name: str, process: ExecSession, interactive: bool) -> int:
    """Passes on standard input, then prints the id; returns the exit code."""
    if process.end is not None:
        return exit_code(session, process.end)
    if interactive:
        while data := await read_input(_PIECE):
            await process.send(data)
        await process.send_eof()
        await process.settle()
    session.out.result({"id": process.id}, safe(process.id))
    session.out.note(f"`volar vms exec --attach {process.id} {name}` attaches to it")
    return 0


async def _talk(session: Session, name: str, process: ExecSession, interactive: bool, escape: int) -> int:
    """Passes everything on until the command ends, the user detaches, or a signal ends volar; returns the exit code."""
    terminal = process.tty and interactive and sys.stdin.isatty()
    code: int | None = None
    try:
        with raw(sys.stdin.fileno()) if terminal else nullcontext():
            code = await pass_on(session, process, interactive, terminal, escape)
    except ConnectionLost as lost:
        if process.id is None:
            raise
        hint = f"it keeps running: `volar vms exec --attach {process.id} --from {process.position} {name}`"
        raise ConnectionLost(lost.detail, hint=hint) from lost
    if code is not None:
        return code
    if process.end is None:
        session.out.note(f"volar: detached; `volar vms exec --attach {process.id} {name}` attaches to it again")
        return 0
    return exit_code(session, process.end)


async def pass_on(
    session: Session, process: ExecSession, interactive: bool, terminal: bool, escape: int = -1, endings: bool = True
) -> int | None:
    """Passes on input, output and the size of the terminal until the command ends.

    Returns the exit code after a signal. Otherwise returns None, and `process.end` has the end, or None if the user
    detached.

    :param endings: whether SIGTERM and SIGHUP end it; otherwise the caller handles signals
    """
    code: int | None = None
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def ending() -> None:
            nonlocal code
            with trio.open_signal_receiver(*ENDINGS) as signals:
                async for number in signals:
                    code = 128 + number
                    nursery.cancel_scope.cancel()

        async def resizing() -> None:
            with trio.open_signal_receiver(signal.SIGWINCH) as signals:
                await _send_size(process)
                async for _ in signals:
                    await _send_size(process)

        async def typing() -> None:
            if await _type(process, escape if terminal and process.id is not None else -1):
                nursery.cancel_scope.cancel()

        if endings:
            nursery.start_soon(ending)
        if process.tty and sys.stdin.isatty():
            nursery.start_soon(resizing)
        if interactive:
            nursery.start_soon(typing)
        try:
            async for piece in process:
                if isinstance(piece, ExecGap):
                    _print_gap(session, piece.gap)
                else:
                    await _show(session, piece)
        except Exception as error:
            # Raised outside of the nursery, so that it is in no group.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None and code is None:
        raise failure
    return code


async def _type(process: ExecSession, escape: int) -> bool:
    """Sends the input until it ends or the command ends; returns whether the escape key was pressed."""
    try:
        while data := await read_input(_PIECE):
            at = data.find(escape) if escape >= 0 else -1
            if at >= 0:
                await process.send(data[:at])
                return True
            await process.send(data)
        await process.send_eof()
    except ConnectionLost:
        pass  # The task that reads the output gets the error.
    return False


async def _send_size(process: ExecSession) -> None:
    size = terminal_size()
    if size is not None:
        try:
            await process.resize(*size)
        except ConnectionLost:
            pass


def terminal_size() -> tuple[int, int] | None:
    """Returns the rows and columns of volar's terminal."""
    try:
        size = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        return None
    return (size.lines, size.columns) if size.lines and size.columns else None


async def _show(session: Session, piece: ExecOutput) -> None:
    if session.out.json:
        session.out.item(piece)
    else:
        await write_output(piece.data, (sys.stdout if piece.stream == "stdout" else sys.stderr).fileno())


def _print_gap(session: Session, gap: LogRange) -> None:
    if session.out.json:
        session.out.item({"gap": gap})
    else:
        session.out.note(f"volar: {gap.last - gap.first + 1} bytes of the output are not kept any more")


def exit_code(session: Session, end: ExecEnd) -> int:
    if session.out.json:
        session.out.item(end)
    if end.exit_code is not None:
        return end.exit_code
    if end.signal is not None:
        return 128 + end.signal
    codes = {"timeout": TIMED_OUT, "not_found": _NOT_FOUND_IN_GUEST}
    codes |= dict.fromkeys(("not_executable", "no_such_user", "no_such_directory"), _NOT_EXECUTABLE)
    code = codes.get(end.code or "", NOT_RUN)
    if session.out.json:
        return code
    raise Failure(f"in the guest: {end.error}", code=code)
