"""Runs a command's function: creates its client, handles interrupts, converts errors to messages and exit codes."""

from __future__ import annotations

import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import click

from volant.client import ClientError, ConnectionLost, DeadlineExceeded, Unreachable
from volant.model import WAIT_STATES, Problem, parse_duration

from ._options import Options, common
from ._output import Output, as_json, styled
from ._streams import BROKEN_PIPE, OutputError, discard_output
from ._target import target_of
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
NOT_RUN = 125
"""The exit code of `run` and `exec` when volar or the daemon failed, the same as Docker's."""
_OWN_FAILURES = frozenset({FAILED, NOT_FOUND, CONFLICT, UNREACHABLE})
_SIMILAR_S = 1.0
"""How long an error message waits for the names of VMs, to suggest one."""


class Failure(Exception):
    """A command failed; `code` is the exit code."""

    def __init__(self, detail: str, *, code: int = FAILED, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.hint = hint


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

    return run_plain(work(Session(plain_client_of(options), Output(options.json, options.names), options)))


def plain_client_of(options: Options, within_s: float | None = None) -> PlainClient:
    """Returns the client for requests. :raises click.UsageError: the address or the key is malformed."""
    from volant.client._plain import PlainClient

    return asked_for(options, functools.partial(PlainClient, within_s=within_s))


def asked_for(options: Options, client: Callable[..., S]) -> S:
    """Returns a client for the daemon in the options. :raises click.UsageError: the address or the key is malformed."""
    target = target_of(options)
    try:
        return client(
            target.address, api_key=target.api_key, tls=target.tls, project=project_of(options), host=options.host
        )
    except ValueError as error:
        raise click.UsageError(f"the address, the API key, --project, --host or a certificate: {error}") from None


def project_of(options: Options) -> str | None:
    """Returns the project in the options or the environment; None if there is none."""
    return options.in_project or os.environ.get("VOLANT_PROJECT") or None


def guarded(options: Options, work: Callable[[], int | None]) -> int:
    """Runs `work`; converts its errors to a message and an exit code."""
    if not gc.isenabled():
        # As `main` has started, and all is imported.
        gc.freeze()
        gc.enable()
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
    """Returns the error to report from nested groups; an interrupt takes precedence."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    members = [_first(member) for member in error.exceptions]
    return next((member for member in members if isinstance(member, KeyboardInterrupt)), members[0])


def _explain(options: Options, error: BaseException) -> int:
    """Prints what failed; returns the exit code."""
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
        hint = _similar_names(options, error.vm) if error.code == "vm-not-found" and error.vm else None
        facts |= {"vm": error.vm, "request_id": getattr(error, "request_id", None), "hint": hint or error.hint}
    elif isinstance(error, ClientError):
        if isinstance(error, Unreachable | ConnectionLost):
            code = UNREACHABLE
        elif isinstance(error, DeadlineExceeded):
            code = options.failure or TIMED_OUT
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
    if options.failure is not None and code in _OWN_FAILURES:
        code = options.failure
    _print_error(options, facts, code)
    return code


def _similar_names(options: Options, name: str) -> str | None:
    """Returns a hint with the names of VMs that are similar to one that does not exist."""
    from volant.client._plain import run_plain

    from ._lazy_group import did_you_mean

    try:
        vms = run_plain(plain_client_of(options, within_s=_SIMILAR_S).vms.list())
    except Exception:
        # The hint is an extra; the error itself is reported.
        return None
    hint = did_you_mean(name, [vm.name for vm in vms]).strip()
    return hint[:1].lower() + hint[1:] or None


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


class Passing(click.Command):
    """A command that exits with the exit code of a program in a VM. Its own failures, including wrong usage, exit with
    125."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with _not_run():
            ctx = super().make_context(*arguments, **named)
        ctx.ensure_object(Options).failure = NOT_RUN
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        with _not_run():
            return super().invoke(ctx)


@contextmanager
def _not_run() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        # Click reads it from the instance.
        vars(error)["exit_code"] = NOT_RUN
        raise


class Duration(click.ParamType[float]):
    """A duration such as `500ms`, `10s`, `2m`, `1h`, in seconds."""

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
    """States to wait for, such as `running,crashed`."""

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
    """A pair `KEY=VALUE`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text
