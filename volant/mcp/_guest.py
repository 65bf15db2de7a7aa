"""Access of tools to a guest through the agent's routes: commands, files, actions. Everything is limited, as a model
reads the answer and a guest is not trusted."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import trio

from volant.channel import AgentProtocolError, AgentResponse, AgentUnreachable
from volant.http import first_problem
from volant.model import Action, Key, Problem, invalid
from volant.model.agent import EXEC
from volant.model.agent_types import ExecRequest
from volant.operations import ApiDeps, enter
from volant.relay import first_text, to_port, unreachable

from ._text import Window

MAX_BLOB = 1024 * 1024
"""Maximum size of a file or image that is returned whole, in bytes."""
MAX_READ = 64 * 1024 * 1024
"""Maximum bytes read to reach an offset in a file without a length."""
FILE_S = 60.0
_HEAD_S = 30.0
_LATE_S = 10.0
_MAX_LINE = 1024 * 1024
_TOTAL = re.compile(rb"/([0-9]{1,18})\Z")
_JSON = [(b"content-type", b"application/json")]

_encoder = msgspec.json.Encoder()


class _Line(msgspec.Struct):
    """One of the agent's lines about a command."""

    stream: str | None = None
    data: bytes = b""
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    code: str | None = None


_lines = msgspec.json.Decoder(_Line)


class _AgentProblem(msgspec.Struct):
    error: str = ""
    detail: str = ""
    field: str | None = None
    hint: str | None = None


_problems = msgspec.json.Decoder(_AgentProblem)


class Ran(msgspec.Struct):
    """The result of a command that ended, or was killed."""

    stdout: Window = msgspec.field(default_factory=Window)
    stderr: Window = msgspec.field(default_factory=Window)
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None


async def run_command(deps: ApiDeps, vm: Key, request: ExecRequest, timeout_s: float) -> Ran:
    """Runs a command to its end, or for `timeout_s`. :raises Problem: 400, 404, 409, 502."""
    ran = Ran()
    body = _encoder.encode({**request, "timeout_s": timeout_s})
    _, client = await enter(deps, vm)
    with _guest_errors(vm.name), trio.move_on_after(timeout_s + _LATE_S) as scope:
        async with client.stream("POST", EXEC, _JSON, body, timeout_s=_HEAD_S) as response:
            await _check(response, vm.name)
            lines = _Lines()
            async for data in response:
                for line in lines.feed(data):
                    match line.stream:
                        case "stdout":
                            ran.stdout.add(line.data)
                        case "stderr":
                            ran.stderr.add(line.data)
                        case _:
                            ran.exit_code, ran.signal, ran.error = line.exit_code, line.signal, line.error
                            return ran
            raise AgentUnreachable("the command's output broke off, and how it ended is not known")
    if scope.cancelled_caught:
        ran.error = f"the agent did not end the command after its {timeout_s:g} s"
    return ran


class _Lines:
    """Splits the agent's stream into lines."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[_Line]:
        """Adds data, and returns the complete lines. :raises AgentProtocolError: the lines are malformed."""
        self._rest += data
        if b"\n" not in data:
            if len(self._rest) > _MAX_LINE:
                raise AgentProtocolError("a line about a command is longer than 1 MiB")
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        try:
            return [_lines.decode(line) for line in lines]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise AgentProtocolError(f"a line about a command is malformed: {error}") from error


class FileRead(msgspec.Struct):
    """Some bytes of a file."""

    data: bytes
    size: int | None
    """The size of the whole file; None for a file without a length, such as in `/proc`, if its end was not reached."""
    ended: bool
    """Whether `data` reaches the end of the file."""


async def read_file(deps: ApiDeps, vm: Key, path: str, *, offset: int = 0, limit: int = MAX_BLOB) -> FileRead:
    """Reads at most `limit` bytes of a file from `offset` on.

    :raises Problem: 400, 404, 409, 502, and the agent's own problems.
    """
    headers = [(b"range", b"bytes=%d-%d" % (offset, offset + limit - 1))]
    _, client = await enter(deps, vm, path)
    with _guest_errors(vm.name), trio.move_on_after(FILE_S):
        async with client.stream("GET", _route(path), headers, timeout_s=_HEAD_S) as response:
            await _check(response, vm.name)
            fields = dict(response.headers)
            if fields.get(b"content-type", b"").startswith(b"application/x-tar"):
                raise invalid("path", f"{path} is a directory", hint='list it with the command ["ls", "-la", …]')
            # The agent sends no ranges of a file without a length, so the part before `offset` is skipped here.
            skip = 0 if response.status == 206 else offset
            data = bytearray()
            passed = 0
            async for piece in response:
                passed += len(piece)
                data += piece[max(0, len(piece) - max(0, passed - skip)) :]
                if len(data) > limit or passed > MAX_READ:
                    break
            else:
                total = _TOTAL.search(fields.get(b"content-range", b""))
                size = int(total[1]) if total else passed
                return FileRead(bytes(data[:limit]), size, offset + len(data) >= size)
            return FileRead(bytes(data[:limit]), None, False)
    raise Problem(502, "file-slow", f"reading {path} in VM {vm.name!r} took longer than {FILE_S:g} s", vm=vm.name)


async def write_file(deps: ApiDeps, vm: Key, path: str, data: bytes) -> None:
    """Writes or replaces a file atomically. :raises Problem: see `read_file`."""
    _, client = await enter(deps, vm, path)
    headers = [(b"content-type", b"application/octet-stream")]
    with _guest_errors(vm.name), trio.move_on_after(FILE_S) as scope:
        async with client.stream("PUT", _route(path), headers, data, timeout_s=FILE_S) as response:
            await _check(response, vm.name)
    if scope.cancelled_caught:
        raise Problem(502, "file-slow", f"writing {path} in VM {vm.name!r} took longer than {FILE_S:g} s", vm=vm.name)


def _route(path: str) -> str:
    return "/v1/files/" + quote(path.lstrip("/"), safe="/")


class Acted(msgspec.Struct):
    """The workload's answer."""

    status: int
    content_type: str
    body: Window


async def call_action(deps: ApiDeps, vm: Key, name: str, action: Action, port: int, given: Any) -> Acted:
    """Calls an action of the workload, with `given` as JSON, or as the query if the method is GET. The answer holds the
    first `MAX_BLOB` bytes.

    :raises Problem: 400, 404, 409, 502.
    """
    target, body = action.path, b""
    headers = [(b"host", b"localhost:%d" % port)]
    if action.method == "GET" and given is not None:
        if not isinstance(given, dict):
            raise invalid("input", "input is no object, and this action takes one", hint="it is called with GET")
        target += "?" + urlencode({key: _as_text(value) for key, value in given.items()})
    elif given is not None:
        body = _encoder.encode(given)
        headers += _JSON
    _, agent = await enter(deps, vm, name)
    with _guest_errors(vm.name), trio.move_on_after(action.timeout_s):
        async with (
            to_port(agent, vm.name, port) as client,
            client.stream(action.method, target, headers, body or None, timeout_s=action.timeout_s) as response,
        ):
            kind = dict(response.headers).get(b"content-type", b"").decode("latin-1")
            window = Window(MAX_BLOB)
            async for data in response:
                window.add(data)
                if window.size > MAX_BLOB:
                    break
            return Acted(response.status, kind.partition(";")[0].strip().lower()[:100], window)
    text = f"the action took longer than the {action.timeout_s:g} s that it has"
    raise Problem(502, "action-timeout", text, vm=vm.name)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else _encoder.encode(value).decode()


async def _check(response: AgentResponse, vm: str) -> None:
    """Checks the answer. :raises Problem: the agent's own, if it refused the request."""
    if response.status < 400:
        return
    try:
        refusal = _problems.decode(await response.read(64 * 1024))
    except (msgspec.DecodeError, UnicodeDecodeError, AgentProtocolError, RecursionError):
        refusal = _AgentProblem()
    detail = refusal.detail or refusal.error or f"the agent answered {response.status}"
    raise Problem(response.status, "agent-refused", detail[:1000], vm=vm, field=refusal.field, hint=refusal.hint)


@contextmanager
def _guest_errors(vm: str) -> Iterator[None]:
    try:
        yield
    except (AgentUnreachable, AgentProtocolError) as error:
        raise unreachable(vm, str(error)) from error
    except ExceptionGroup as group:
        # Raised by the nursery of a tunnel.
        if group.split(Problem)[1] is None:
            raise first_problem(group) from None
        if group.split((AgentUnreachable, AgentProtocolError))[1] is None:
            raise unreachable(vm, first_text(group)) from group
        raise


def from_base64(text: str, name: str) -> bytes:
    """Decodes base64. :raises Problem: 400 that names the field."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(name, f"{name} is no base64: {error}") from None
