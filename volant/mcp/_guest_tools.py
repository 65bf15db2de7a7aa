"""Tools that work inside a VM."""

from __future__ import annotations

import base64
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from volant.model import Name
from volant.model.agent_types import ExecRequest
from volant.operations import find_action, find_vm

from . import _guest
from ._text import BUDGET, clip, joined, prefix, weight
from ._tool import DEFAULT_S, Image, Path, Result, Seconds, ToolCall, file_link, tool

_PAGE_BYTES = 48 * 1024


class Exec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A command to run."""

    vm: Name
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The program and its arguments. There is no shell: for pipes, globs and `&&` use `["sh", "-c", "…"]`."""
    env: dict[str, str] = {}
    """Variables added to a minimal environment."""
    cwd: str | None = None
    user: str | None = None
    """A name or a number, optionally `:` and a group. Default: root."""
    stdin: str = ""
    timeout_s: Seconds = DEFAULT_S
    """The time after which the command and its children are killed. Start longer ones in the background, with their
    output in a file."""


class ExecDone(msgspec.Struct, frozen=True):
    """The end of a command: one of the first three members is not null."""

    exit_code: int | None
    signal: int | None
    """The number of the signal that ended it."""
    error: str | None
    """Why it did not run, or was killed."""
    stdout: str
    stderr: str
    stdout_bytes: int
    """The number of bytes written, more than shown if `truncated`."""
    stderr_bytes: int
    truncated: bool
    """Whether the middle of stdout or stderr is left out."""


@tool(
    "vms_exec",
    "Run a command in a VM",
    "Run one command in a running VM, wait for its end, and get its exit code and output. Each call is a separate "
    "process: `cd` and variables do not carry over to the next. The middle of long output is left out: write it to a "
    "file, and read parts with vms_read_file. To write a file use vms_write_file.",
    operation="agent_exec",
    destructive=True,
    open_world=True,
)
async def execute(call: ToolCall, wanted: Exec) -> Result[ExecDone]:
    request: ExecRequest = {"command": wanted.command, "env": wanted.env}
    if wanted.cwd is not None:
        request["cwd"] = wanted.cwd
    if wanted.user is not None:
        request["user"] = wanted.user
    if wanted.stdin:
        request["stdin"] = base64.b64encode(wanted.stdin.encode("utf-8", "surrogatepass")).decode("ascii")
    vm = call.named(wanted.vm)
    ran = await call.until(partial(_guest.run_command, call.deps, vm, request, wanted.timeout_s))
    stderr, stderr_whole = ran.stderr.text(BUDGET // 2)
    stdout, stdout_whole = ran.stdout.text(BUDGET - weight(stderr))
    done = ExecDone(
        exit_code=ran.exit_code,
        signal=ran.signal,
        error=clip(ran.error, 1024) if ran.error is not None else None,
        stdout=stdout,
        stderr=stderr,
        stdout_bytes=ran.stdout.size,
        stderr_bytes=ran.stderr.size,
        truncated=not (stdout_whole and stderr_whole),
    )
    return Result(done, failed=ran.error is not None)


class ReadFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file, or the part of it, to read."""

    vm: Name
    path: Path
    """An absolute path."""
    offset: Annotated[int, msgspec.Meta(ge=0, le=10**12)] | None = None
    """The number of bytes to skip; the answer continues from there up to `next_offset`. Without it, you get the whole
    file, or its head and tail if it is too long."""


class FileContent(msgspec.Struct, frozen=True):
    """The content of a file."""

    path: str
    content: str
    encoding: Literal["utf-8", "base64"]
    size: int | None
    """The size of the whole file in bytes; null if unknown."""
    truncated: bool
    """Whether the file has more than is shown."""
    next_offset: int | None = None
    """The `offset` to continue with; null at the end."""


@tool(
    "vms_read_file",
    "Read a file in a VM",
    "Read a file in a running VM: text as it is, other bytes as base64. You get the head and the tail of a long file; "
    "read the middle with `offset`. To list a directory use vms_exec with `ls`.",
    operation="read_file",
    read_only=True,
)
async def read_file(call: ToolCall, wanted: ReadFile) -> Result[FileContent]:
    vm = call.named(wanted.vm)
    offset = wanted.offset or 0
    read = await call.until(partial(_guest.read_file, call.deps, vm, wanted.path, offset=offset, limit=_PAGE_BYTES))
    text = _text_of(read.data, read.ended)
    encoding: Literal["utf-8", "base64"] = "utf-8" if text is not None else "base64"
    if text is not None:
        content = prefix(text, BUDGET)
        shown = len(content.encode())
    else:
        part = read.data[: BUDGET * 3 // 4]
        content = base64.b64encode(part).decode("ascii")
        shown = len(part)
    complete = read.ended and shown == len(read.data)
    if wanted.offset is None and text is not None and not complete and read.size is not None:
        # The head, of which half is shown now, and the tail.
        tail_at = max(shown // 2, read.size - _PAGE_BYTES // 2)
        tail = await call.until(
            partial(_guest.read_file, call.deps, vm, wanted.path, offset=tail_at, limit=_PAGE_BYTES // 2)
        )
        content, shown = joined(text, tail.data.decode("utf-8", "replace"), read.size, BUDGET)
    return Result(
        FileContent(
            path=wanted.path,
            content=content,
            encoding=encoding,
            size=read.size,
            truncated=offset > 0 or not complete,
            next_offset=None if complete else offset + shown,
        ),
        links=() if complete and not offset else (file_link(vm.name, wanted.path),),
    )


def _text_of(data: bytes, whole: bool) -> str | None:
    """Returns the data as text, None if it is not text. A part of a file may end within a character."""
    for cut in range(1 if whole else 4):
        try:
            text = data[: len(data) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return None if "\0" in text else text
    return None


class WriteFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file to write."""

    vm: Name
    path: Path
    """An absolute path; its directory must exist."""
    content: str
    encoding: Literal["utf-8", "base64"] = "utf-8"
    """The encoding of the file's bytes in `content`."""


class WrittenFile(msgspec.Struct, frozen=True):
    """A file that was written."""

    path: str
    size: int
    """The size in bytes."""


@tool(
    "vms_write_file",
    "Write a file in a VM",
    "Write a whole file in a running VM, or replace an existing one; readers see the old or the new file, never a "
    "part. At most about 700 KiB per call.",
    operation="write_file",
    destructive=True,
    idempotent=True,
)
async def write_file(call: ToolCall, wanted: WriteFile) -> Result[WrittenFile]:
    vm = call.named(wanted.vm)
    if wanted.encoding == "base64":
        data = _guest.from_base64(wanted.content, "content")
    else:
        data = wanted.content.encode("utf-8", "surrogatepass")
    await call.until(partial(_guest.write_file, call.deps, vm, wanted.path, data))
    return Result(WrittenFile(wanted.path, len(data)))


class Action(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The action to call."""

    vm: Name
    action: Name
    """An action of the VM's plugin, see plugins_list."""
    input: Any = None
    """The input, sent to the workload as JSON; null for no body."""


class ActionDone(msgspec.Struct, frozen=True):
    """The workload's answer."""

    status: int
    """The HTTP status."""
    content_type: str
    output: Any
    """The answer: data if it is JSON, otherwise text. Null for an image, which is sent separately, and for other
    bytes."""
    size: int
    """The size in bytes."""
    truncated: bool


@tool(
    "vms_call_action",
    "Call an action of a VM",
    "Call one of the actions that the plugin of a running VM offers, such as taking a screenshot in a browser. "
    "plugins_list shows the actions and their input.",
    operation="call_action",
    destructive=True,
    open_world=True,
)
async def call_action(call: ToolCall, wanted: Action) -> Result[ActionDone]:
    row = find_vm(call.deps, call.named(wanted.vm))
    action, port = find_action(row, row.plugin, wanted.action)
    acted = await call.until(partial(_guest.call_action, call.deps, row.key, wanted.action, action, port, wanted.input))
    whole = acted.body.size <= _guest.MAX_BLOB
    output: Any = None
    images: tuple[Image, ...] = ()
    truncated = not whole
    if acted.content_type.startswith("image/"):
        if whole:
            images = (Image(acted.body.head, acted.content_type),)
    elif whole and acted.content_type.endswith("json") and acted.body.size <= BUDGET:
        output = _json_or_text(acted.body.head)
    elif not acted.content_type or acted.content_type.startswith("text/") or acted.content_type.endswith("json"):
        output, complete = acted.body.text(BUDGET)
        truncated = not complete
    return Result(
        ActionDone(acted.status, acted.content_type, output, acted.body.size, truncated),
        images=images,
        failed=acted.status >= 400,
    )


def _json_or_text(data: bytes) -> Any:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return clip(data.decode("utf-8", "replace"), BUDGET)
    return value if weight(value) <= BUDGET else clip(data.decode("utf-8", "replace"), BUDGET)
