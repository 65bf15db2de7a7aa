"""Runs a command's function: makes its client, handles interrupts, turns errors into messages and exit codes."""

from __future__ import annotations

import functools
import os
import stat
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import click

from volant.client import ClientError, ConnectionLost, DeadlineExceeded, Unreachable
from volant.client._address import DEFAULT_BASE, SERVICE_SOCKET
from volant.model import WAIT_STATES, Problem, parse_duration

from ._options import Options, common
from ._output import Output, as_json, styled
from ._streams import BROKEN_PIPE, OutputError, discard_output
from ._text import safe

if TYPE_CHECKING:
    from volant.client._plain import PlainClient
    from volant.client._requests import Requests

    from . import _streaming

P = ParamSpec("P")
S = TypeVar("S")
Work = Callable[[S], Coroutine[Any, Any, int | None]]
"""The function of a command, which takes its session and may return an exit code."""

FAILED = 1
NOT_FOUND = 3
CONFLICT = 4
UNREACHABLE = 5
TIMED_OUT = 124
INTERRUPTED = 130
_MAX_KEY_FILE = 64 * 1024


class Failure(Exception):
    """A command failed; `code` is the exit code."""

    def __init__(self, detail: str, *, code: int = FAILED, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.hint = hint


@contextmanager
def unfinished(part: Path, path: Path) -> Iterator[None]:
    """Removes `part`, the unfinished file of `path`, at the end. :raises Failure: instead of OSError"""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


@dataclass(frozen=True)
class Session:
    """The client and the output of a command that needs only requests and answers."""

    client: Requests
    out: Output
    options: Options

    def stream(self, work: Work[_streaming.Session]) -> int | None:
        """Runs `work` on Trio, with the whole client, and returns its exit code."""
        from ._streaming import run

        return run(self.options, work)


def command(
    group: click.Group | None, name: str, **attributes: Any
) -> Callable[[Callable[Concatenate[Session, P], Coroutine[Any, Any, int | None]]], click.Command]:
    """Makes an async function a command of `group`, or of `volar` itself; it may return an exit code.

    It may await only requests: these run on blocking sockets, as importing Trio and httpx takes longer than they do.
    Use `_streaming.command` for commands that stream or wait.
    """
    return made(_run, group, name, attributes)


def made(
    run: Callable[[Options, Work[S]], int | None], group: click.Group | None, name: str, attributes: dict[str, Any]
) -> Callable[[Callable[Concatenate[S, P], Coroutine[Any, Any, int | None]]], click.Command]:
    """Returns a decorator that makes a function a command, run by `run`."""

    def decorate(function: Callable[Concatenate[S, P], Coroutine[Any, Any, int | None]]) -> click.Command:
        @functools.wraps(function)
        @click.pass_context
        def call(ctx: click.Context, /, *args: P.args, **kwargs: P.kwargs) -> int:
            options = ctx.ensure_object(Options)
            return guarded(options, lambda: run(options, lambda session: function(session, *args, **kwargs)))

        make = click.command if group is None else group.command
        decorated: click.Command = make(name, **attributes)(common()(call))
        return decorated

    return decorate


def _run(options: Options, work: Work[Session]) -> int | None:
    from volant.client._plain import run_plain

    return run_plain(work(Session(plain_client_of(options), Output(options.json), options)))


def plain_client_of(options: Options, within_s: float | None = None) -> PlainClient:
    """Returns the client for requests. :raises click.UsageError: the address or the key is malformed."""
    from volant.client._plain import PlainClient

    return asked_for(options, functools.partial(PlainClient, within_s=within_s))


def asked_for(options: Options, client: Callable[..., S]) -> S:
    """Returns a client for the address and the key of the options. :raises click.UsageError: one is malformed."""
    api_key = api_key_of(options)
    try:
        return client(options.api or _default_address(), api_key=api_key)
    except ValueError as error:
        raise click.UsageError(f"--api or VOLANT_API_BASE, or the API key: {error}") from None


def _default_address() -> str:
    """Returns the service's socket if there is one, else the address of a daemon in the foreground. If the socket
    exists but may not be used, TCP is not tried, as any local user could listen there."""
    try:
        is_there = stat.S_ISSOCK(os.lstat(SERVICE_SOCKET).st_mode)
    except OSError:
        is_there = False
    return f"unix:{SERVICE_SOCKET}" if is_there else DEFAULT_BASE


def api_key_of(options: Options) -> str | None:
    """Returns the API key: from the named file, the environment, or a file that the environment names.

    :raises click.UsageError: the file can't be read, or has no key.
    """
    file = options.api_key_file
    key = os.environ.get("VOLANT_API_KEY")
    if file is None and key:
        return key.strip()
    file = file or os.environ.get("VOLANT_API_KEY_FILE")
    if not file:
        return None
    try:
        with Path(file).open("rb") as opened:
            lines = opened.read(_MAX_KEY_FILE).decode("latin-1").splitlines()
    except OSError as error:
        raise click.UsageError(f"the API key file {file!r} can't be read: {error.strerror}") from None
    for line in lines:
        if line.strip() and not line.strip().startswith("#"):
            return line.strip()
    raise click.UsageError(f"the API key file {file!r} has no key in it")


def guarded(options: Options, work: Callable[[], int | None]) -> int:
    """Runs `work`; turns what it raises into a message and an exit code."""
    try:
        return work() or 0
    except BaseException as raised:
        error = _first(raised)
        if isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
            raise error from None
        if options.debug:
            traceback.print_exception(raised)
        return _explain(options, error)


def _first(error: BaseException) -> BaseException:
    """Returns the error to report, out of nested groups: an interrupt before all others."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    members = [_first(member) for member in error.exceptions]
    return next((member for member in members if isinstance(member, KeyboardInterrupt)), members[0])


def _explain(options: Options, error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OutputError):
        discard_output()
        if error.broken_pipe:
            return BROKEN_PIPE
    facts: dict[str, object] = {"code": "internal", "detail": str(error)}
    code = FAILED
    if isinstance(error, Problem):
        code = {404: NOT_FOUND, 409: CONFLICT, 412: CONFLICT}.get(error.status, FAILED)
        facts = {"status": error.status, "code": error.code, "detail": error.detail, "field": error.field}
        facts |= {"vm": error.vm, "request_id": getattr(error, "request_id", None), "hint": error.hint}
    elif isinstance(error, ClientError):
        if isinstance(error, Unreachable | ConnectionLost):
            code = UNREACHABLE
        elif isinstance(error, DeadlineExceeded):
            code = TIMED_OUT
        facts = {"code": error.code, "detail": error.detail, "hint": error.hint}
    elif isinstance(error, Failure):
        code = error.code
        facts = {"code": "failed", "detail": error.detail, "hint": error.hint}
    elif isinstance(error, OutputError):
        facts = {"code": "output-failed", "detail": str(error)}
    elif isinstance(error, OSError):
        facts = {"code": "os-error", "detail": str(error)}
    else:
        facts["detail"] = f"an error in volar itself: {type(error).__name__}: {error}"
        facts["hint"] = "--debug shows where; please report it"
    _print_error(options, facts, code)
    return code


def _print_error(options: Options, facts: dict[str, object], code: int) -> None:
    stream = sys.stderr
    if options.json:
        given = {name: value for name, value in facts.items() if value is not None}
        stream.write(as_json({"error": given | {"exit_code": code}}).decode() + "\n")
    else:
        detail = safe(facts["detail"])
        field = facts.get("field")
        if field and str(field) not in detail:
            detail += f" ({safe(field)})"
        stream.write(f"{styled('volar:', 'red', stream, bold=True)} {detail}\n")
        if facts.get("hint"):
            stream.write(f"  {safe(facts['hint'])}\n")
        if facts.get("request_id") and int(str(facts.get("status", 0))) >= 500:
            stream.write(f"  see request {safe(facts['request_id'])} in the daemon's log\n")
    stream.flush()


class Duration(click.ParamType[float]):
    """`500ms`, `10s`, `2m`, `1h`: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        try:
            return parse_duration(value, param.name if param and param.name else "it")
        except Problem as problem:
            self._refuse(f"{problem.detail}; {problem.hint}", param, ctx)

    def _refuse(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        self.fail(text, param, ctx)


class States(click.ParamType[tuple[str, ...]]):
    """`running,crashed`: states to wait for."""

    name = "states"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        wanted = tuple(state.strip() for state in str(value).split(","))
        for state in wanted:
            if state not in WAIT_STATES:
                self.fail(f"{state!r} is not a state to wait for; use one of {', '.join(WAIT_STATES)}", param, ctx)
        return wanted


class Pair(click.ParamType[tuple[str, str]]):
    """`KEY=VALUE`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text
