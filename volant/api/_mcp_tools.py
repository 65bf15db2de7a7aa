"""The tools: what a model can ask of Volant, one for each verb.

Each is a struct of arguments, a struct of what it gives, and a function between them that calls what the REST routes
call. The schemas are made from the structs, so that neither can say what the other does not do. What a struct can't
tell, when to use a tool and when another, is in its description, which is written for the model that chooses.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import msgspec
import trio

from volant.journal import EventGap, LogGap
from volant.model import (
    CreateVm,
    Event,
    EventId,
    EventType,
    Labels,
    LogLine,
    Name,
    Problem,
    Status,
    StreamGap,
    Verb,
    VerbKind,
    VmRow,
    VmView,
    check_create,
    view,
)
from volant.model.agent_types import ExecRequest

from . import _mcp_guest
from ._actions import action_of
from ._doors import Doors
from ._logs import log_of
from ._mcp_text import BUDGET, clip, fitting, fitting_last, joined, prefix, weight
from ._params import no_such_plugin, vm_row
from ._waits import interruptible

T = TypeVar("T")

_DEFAULT_S = 50.0
_PAGE_BYTES = 48 * 1024
_LINE_BYTES = 4 * 1024


class _Arguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a tool takes."""


Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*$", max_length=4096)]


@dataclass(frozen=True)
class Link:
    """Where the whole of something is."""

    uri: str
    name: str
    mime_type: str


@dataclass(frozen=True)
class Image:
    """A picture for the model to look at."""

    data: bytes
    mime_type: str


@dataclass(frozen=True)
class Result:
    """What a tool gives: its struct, and what goes beside it."""

    value: msgspec.Struct
    links: tuple[Link, ...] = ()
    images: tuple[Image, ...] = ()
    failed: bool = False
    """It was done, and what came of it is a failure."""


class Asked:
    """A call under way: the doors, the daemon's stop, and somebody who wants to hear how far it is."""

    def __init__(self, doors: Doors, stopping: trio.Event) -> None:
        self.doors = doors
        self._stopping = stopping
        self.news = trio.Event()
        self.told = ""
        """What there is to say of its progress; `news` is set when it changes."""

    def tell(self, text: str) -> None:
        """Let the client know how far it is."""
        self.told = text
        self.news.set()

    async def until(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Wait for something that may take long. :raises Problem: 503 the daemon stops."""
        done: list[T] = []

        async def run() -> None:
            done.append(await wait())

        async with interruptible(self._stopping) as waits:
            await waits.until(run)
        if not done:
            raise Problem(503, "daemon-stopping", "the daemon stops", hint="call again when it is back")
        return done[0]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool."""

    name: str
    title: str
    description: str
    takes: type[msgspec.Struct]
    gives: type[msgspec.Struct]
    run: Callable[[Asked, Any], Awaitable[Result]]
    read_only: bool = False
    destructive: bool = False
    """Whether it can lose something that was there."""
    idempotent: bool = False
    """Whether doing it twice does no more than doing it once."""
    open_world: bool = False
    """Whether what happens is up to a guest, which may do anything."""


# VMs


class ListVms(_Arguments, frozen=True):
    """Which VMs."""

    status: list[Status] = []
    """Only VMs in one of these states."""
    plugin: Name | None = None
    """Only VMs of this plugin."""
    labels: Labels = {}
    """Only VMs that have all of these labels."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
    cursor: Annotated[int, msgspec.Meta(ge=0, le=10**18 - 1)] = 0
    """`next_cursor` of the page before."""


class VmPage(msgspec.Struct, frozen=True):
    """Some of the VMs, by id."""

    vms: list[VmView]
    total: int
    """How many fit, on all pages."""
    next_cursor: int | None = None
    """Null on the last page."""


async def _list(asked: Asked, wanted: ListVms) -> Result:
    rows = [
        row
        for row in asked.doors.store.projection.rows()
        if (not wanted.status or row.status in wanted.status)
        and wanted.plugin in (None, row.plugin)
        and wanted.labels.items() <= row.labels.items()
    ]
    left = [row for row in rows if row.id > wanted.cursor]
    page = fitting(view(row) for row in left[: wanted.limit])
    return Result(VmPage(page, len(rows), page[-1].id if page and len(page) < len(left) else None))


class GetVm(_Arguments, frozen=True):
    """Which VM."""

    vm: Name


async def _get(asked: Asked, wanted: GetVm) -> Result:
    return Result(view(vm_row(asked.doors, wanted.vm)), links=(log_link(wanted.vm),))


class MakeVm(CreateVm, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM, and whether to wait for it."""

    wait: bool = True
    """Answer once it runs and commands can be executed in it, or has failed to."""
    timeout_s: Seconds = _DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


class ChangedVm(msgspec.Struct, frozen=True):
    """A VM after a change."""

    vm: VmView
    outcome: Literal["done", "failed", "under_way"]
    """`done`: it is in the state that was asked for. `failed`: it came to rest in another one, see `vm.reason`.
    `under_way`: not there yet."""


async def _create(asked: Asked, wanted: MakeVm) -> Result:
    asked_for = CreateVm(**{name: getattr(wanted, name) for name in CreateVm.__struct_fields__})
    check_create(asked_for)
    since = asked.doors.store.projection.last_event
    row = await asked.doors.vms.create(asked_for)
    return await _changed(asked, row, {Status.RUNNING}, wanted.wait, wanted.timeout_s, since)


class StartVm(_Arguments, frozen=True):
    """Which VM."""

    vm: Name
    wait: bool = True
    """Answer once it runs, or has failed to."""
    timeout_s: Seconds = _DEFAULT_S
    """How long to wait. What is not ready then goes on; look again with vms_get."""


class StopVm(_Arguments, frozen=True):
    """Which VM."""

    vm: Name
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 10.0
    """How long the guest has to shut down before it is killed."""
    wait: bool = True
    """Answer once it is done, or has failed."""
    timeout_s: Seconds = _DEFAULT_S
    """How long to wait. What is not done then goes on; look again with vms_get."""


async def _start(asked: Asked, wanted: StartVm) -> Result:
    return await _verb(asked, wanted, Verb(VerbKind.START), Status.RUNNING)


async def _stop(asked: Asked, wanted: StopVm) -> Result:
    return await _verb(asked, wanted, Verb(VerbKind.STOP, grace_s=wanted.grace_s), Status.STOPPED)


async def _restart(asked: Asked, wanted: StopVm) -> Result:
    return await _verb(asked, wanted, Verb(VerbKind.RESTART, grace_s=wanted.grace_s), Status.RUNNING)


async def _verb(asked: Asked, wanted: StartVm | StopVm, verb: Verb, state: Status) -> Result:
    name = vm_row(asked.doors, wanted.vm).name
    since = asked.doors.store.projection.last_event
    row = await asked.doors.vms.verb(name, verb)
    return await _changed(asked, row, {state}, wanted.wait, wanted.timeout_s, since)


async def _changed(
    asked: Asked, row: VmRow, states: Collection[str], wait: bool, timeout_s: float, since: EventId
) -> Result:
    """The VM once it is in one of `states`, if somebody waits for that."""
    outcome: Literal["done", "failed", "under_way"] = "done" if row.status in states else "under_way"
    if wait:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell_of, asked, row.id, since)
            wait_for_it = partial(asked.doors.vms.wait, row.id, states, timeout_s, since=since)
            found, now = await asked.until(wait_for_it)
            nursery.cancel_scope.cancel()
        if now is None:
            raise Problem(409, "vm-deleted", f"VM {row.name!r} was deleted meanwhile", vm=row.name)
        row, outcome = now, _OUTCOMES[found]
    return Result(ChangedVm(view(row), outcome), links=(log_link(row.name),), failed=outcome == "failed")


_OUTCOMES: dict[str, Literal["done", "failed", "under_way"]] = {
    "met": "done",
    "failed": "failed",
    "timeout": "under_way",
}


async def _tell_of(asked: Asked, vm_id: int, since: EventId) -> None:
    async with asked.doors.store.events.cursor(since) as cursor:
        while taken := await cursor.take():
            if not isinstance(taken, EventGap):
                for frame in taken:
                    if frame.event.vm_id == vm_id:
                        asked.tell(f"{frame.event.name}: {frame.event.message}")


class DeletedVm(msgspec.Struct, frozen=True):
    """A VM that is gone."""

    name: str
    deleted: Literal[True] = True


async def _delete(asked: Asked, wanted: GetVm) -> Result:
    name = vm_row(asked.doors, wanted.vm).name
    await asked.until(partial(asked.doors.vms.delete, name))
    return Result(DeletedVm(name))


# Inside a VM


class Exec(_Arguments, frozen=True):
    """A command."""

    vm: Name
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The program and its arguments. There is no shell: for pipes, globs and `&&` use `["sh", "-c", "…"]`."""
    env: dict[str, str] = {}
    """Added to a small environment."""
    cwd: str | None = None
    user: str | None = None
    """A name or a number, optionally `:` and a group. Default: root."""
    stdin: str = ""
    timeout_s: Seconds = _DEFAULT_S
    """The command and its children are killed then. For what takes longer, start it in the background, with its
    output in a file."""


class ExecDone(msgspec.Struct, frozen=True):
    """How a command ended: one of the first three is not null."""

    exit_code: int | None
    signal: int | None
    """The number of the signal that ended it."""
    error: str | None
    """Why it could not be run, or not to its end."""
    stdout: str
    stderr: str
    stdout_bytes: int
    """What was written in all; more than is shown if `truncated`."""
    stderr_bytes: int
    truncated: bool
    """Whether the middle of stdout or stderr is left out."""


async def _exec(asked: Asked, wanted: Exec) -> Result:
    request: ExecRequest = {"command": wanted.command, "env": wanted.env}
    if wanted.cwd is not None:
        request["cwd"] = wanted.cwd
    if wanted.user is not None:
        request["user"] = wanted.user
    if wanted.stdin:
        request["stdin"] = base64.b64encode(wanted.stdin.encode("utf-8", "surrogatepass")).decode("ascii")
    vm = vm_row(asked.doors, wanted.vm).name
    ran = await asked.until(partial(_mcp_guest.run_command, asked.doors, vm, request, wanted.timeout_s))
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


class ReadFile(_Arguments, frozen=True):
    """A file, or a part of it."""

    vm: Name
    path: Path
    """Absolute."""
    offset: Annotated[int, msgspec.Meta(ge=0, le=10**12)] | None = None
    """Bytes to skip. Without it the file is shown from its beginning, and of one that is too long the head and the
    tail; with it, what follows, up to `next_offset`."""


class FileContent(msgspec.Struct, frozen=True):
    """What is in a file."""

    path: str
    content: str
    encoding: Literal["utf-8", "base64"]
    size: int | None
    """The whole file's bytes; null when that is not known."""
    truncated: bool
    """Whether there is more in the file than is shown."""
    next_offset: int | None = None
    """Where to read on; null at the end."""


async def _read(asked: Asked, wanted: ReadFile) -> Result:
    vm = vm_row(asked.doors, wanted.vm).name
    offset = wanted.offset or 0
    read = await asked.until(
        partial(_mcp_guest.read_file, asked.doors, vm, wanted.path, offset=offset, limit=_PAGE_BYTES)
    )
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
        tail = await asked.until(
            partial(_mcp_guest.read_file, asked.doors, vm, wanted.path, offset=tail_at, limit=_PAGE_BYTES // 2)
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
        links=() if complete and not offset else (file_link(vm, wanted.path),),
    )


def _text_of(data: bytes, whole: bool) -> str | None:
    """None when it is no text. What is not whole may end in the middle of a character."""
    for cut in range(1 if whole else 4):
        try:
            text = data[: len(data) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return None if "\0" in text else text
    return None


class WriteFile(_Arguments, frozen=True):
    """A file."""

    vm: Name
    path: Path
    """Absolute; its directory must be there."""
    content: str
    encoding: Literal["utf-8", "base64"] = "utf-8"
    """How `content` stands for the file's bytes."""


class WrittenFile(msgspec.Struct, frozen=True):
    """A file that was written."""

    path: str
    size: int
    """In bytes."""


async def _write(asked: Asked, wanted: WriteFile) -> Result:
    vm = vm_row(asked.doors, wanted.vm).name
    if wanted.encoding == "base64":
        data = _mcp_guest.from_base64(wanted.content, "content")
    else:
        data = wanted.content.encode("utf-8", "surrogatepass")
    await asked.until(partial(_mcp_guest.write_file, asked.doors, vm, wanted.path, data))
    return Result(WrittenFile(wanted.path, len(data)))


class Action(_Arguments, frozen=True):
    """What the workload should do."""

    vm: Name
    action: Name
    """One of the actions of the VM's plugin: see plugins_list."""
    input: Any = None
    """Sent to the workload as JSON; null for nothing."""


class ActionDone(msgspec.Struct, frozen=True):
    """What the workload answered."""

    status: int
    """Of HTTP."""
    content_type: str
    output: Any
    """The answer: data where it is JSON, else text; null for an image, which stands beside it, and for other bytes."""
    size: int
    """In bytes."""
    truncated: bool


async def _act(asked: Asked, wanted: Action) -> Result:
    row = vm_row(asked.doors, wanted.vm)
    action, port = action_of(row, row.plugin, wanted.action)
    acted = await asked.until(partial(_mcp_guest.call_action, asked.doors, row.name, action, port, wanted.input))
    whole = acted.body.size <= _mcp_guest.MAX_BLOB
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


# What happened


class Logs(_Arguments, frozen=True):
    """Which lines."""

    vm: Name
    tail: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """The last so many lines."""
    since: Annotated[int, msgspec.Meta(ge=0, le=10**18 - 1)] | None = None
    """Only lines after this `seq`; `next_since` of an earlier call gives what is new. Wins over `tail`."""
    stream: list[Literal["stdout", "stderr", "console"]] = []
    """Default: all. `console` is the kernel and the boot, the others are the workload's."""


class LogPage(msgspec.Struct, frozen=True):
    """Lines of a log, oldest first."""

    lines: list[LogLine]
    next_since: int
    """For `since`, to go on after the last line."""
    left_out: int
    """Lines that were asked for and did not fit: older ones, or with `since` newer ones."""
    lost: int = 0
    """Lines after `since` that are not kept any more."""


async def _logs(asked: Asked, wanted: Logs) -> Result:
    row = vm_row(asked.doors, wanted.vm)
    log = log_of(asked.doors, row)
    lines: list[LogLine] = []
    bytes_kept = left_out = lost = 0
    position = log.newest if wanted.since is None else min(wanted.since, log.newest)
    newest = wanted.since is None
    async with log.cursor(
        since_seq=wanted.since,
        tail=wanted.tail if newest else None,
        streams=frozenset(wanted.stream),
        follow=False,
    ) as cursor:
        while taken := await asked.until(partial(cursor.take, 64 * 1024)):
            if isinstance(taken, LogGap):
                lost += taken.last - taken.first + 1
                continue
            for frame in taken:
                line = msgspec.json.decode(frame, type=LogLine)
                lines.append(msgspec.structs.replace(line, line=clip(line.line, _LINE_BYTES)))
                bytes_kept += weight(lines[-1]) + 1
            if newest:
                kept = fitting_last(lines)
                left_out += len(lines) - len(kept)
                lines = kept
            elif bytes_kept > BUDGET:
                kept = fitting(lines)
                left_out = max(0, log.newest - kept[-1].seq)
                lines = kept
                break
        if lines:
            position = lines[-1].seq
        elif not newest:
            position = max(position, cursor.position)
    return Result(LogPage(lines, position, left_out, lost), links=(log_link(row.name),))


class Events(_Arguments, frozen=True):
    """Which events."""

    since: str | None = None
    """After this event: `next` of an earlier call, or the `id` of an event. `0` for the oldest that is kept. Without
    it, the newest ones."""
    vm: Name | None = None
    """Only of this VM."""
    types: list[EventType] = []
    """Default: all."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 50
    """How many events to look at."""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=50)] = 0.0
    """Wait so long for one when there is none."""


class EventPage(msgspec.Struct, frozen=True):
    """Events, oldest first."""

    events: list[Event]
    next: str
    """For `since`, to go on after them."""
    gap: StreamGap | None = None
    """Events after `since` that are not kept any more."""


async def _events(asked: Asked, wanted: Events) -> Result:
    log = asked.doors.store.events
    after: EventId | str | None = wanted.since and wanted.since[:200]
    gap = None
    if not after:
        after = EventId(log.epoch, max(log.oldest.seq - 1, log.newest.seq - wanted.limit))
    elif after == "0":
        after = "oldest"
    elif (missed := log.gap(after)) is not None:
        gap = msgspec.json.decode(missed.data, type=StreamGap)
        after = "oldest"
    found: list[Event] = []
    looked_at = 0
    deadline = trio.current_time() + wanted.wait_s
    async with log.cursor(after) as cursor:
        position = cursor.position
        while looked_at < wanted.limit:
            at_end = position.seq >= log.newest.seq
            if at_end and (found or trio.current_time() >= deadline):
                break
            with trio.CancelScope(deadline=deadline if at_end else float("inf")) as scope:
                taken = await asked.until(partial(cursor.take, _PAGE_BYTES))
            if scope.cancelled_caught or not taken:
                break
            if isinstance(taken, EventGap):
                gap = msgspec.json.decode(taken.data, type=StreamGap)
                position = cursor.position
                continue
            for frame in taken[: wanted.limit - looked_at]:
                looked_at += 1
                position = EventId(log.epoch, frame.seq)
                if _wants(wanted, frame.event):
                    found.append(frame.event)
    page = fitting(found)
    return Result(EventPage(page, page[-1].id if len(page) < len(found) else str(position), gap))


def _wants(wanted: Events, event: Event) -> bool:
    return wanted.vm in (None, event.name) and (not wanted.types or event.type in wanted.types)


# Plugins


class ListPlugins(_Arguments, frozen=True):
    """All of them."""

    plugin: Name | None = None
    """Only this one."""


class PluginAction(msgspec.Struct, frozen=True):
    """Something that a plugin's workload does when asked."""

    name: str
    description: str
    input: dict[str, Any] | None
    """JSON Schema of what vms_call_action takes as `input`; null when the plugin does not say."""


class PluginSummary(msgspec.Struct, frozen=True):
    """A kind of VM."""

    name: str
    description: str
    version: str
    enabled: bool
    """Whether new VMs may use it."""
    memory_mb: int
    """What its VMs need at least."""
    actions: list[PluginAction]


class PluginList(msgspec.Struct, frozen=True):
    """Kinds of VMs."""

    plugins: list[PluginSummary]
    left_out: int
    """How many did not fit; ask for them by name."""


async def _plugins(asked: Asked, wanted: ListPlugins) -> Result:
    found = [
        PluginSummary(
            name=plugin.manifest.name,
            description=plugin.manifest.description,
            version=plugin.manifest.version,
            enabled=plugin.enabled,
            memory_mb=plugin.manifest.resources.memory_mb,
            actions=[
                PluginAction(name, action.description, action.input) for name, action in plugin.manifest.actions.items()
            ],
        )
        for plugin in asked.doors.store.projection.plugins.values()
        if wanted.plugin in (None, plugin.manifest.name)
    ]
    if wanted.plugin is not None and not found:
        raise no_such_plugin(wanted.plugin)
    page = fitting(found)
    await trio.lowlevel.checkpoint()
    return Result(PluginList(page, len(found) - len(page)))


def log_link(vm: str) -> Link:
    """Where the log of a VM is."""
    return Link(f"{vm_uri(vm)}/logs", f"The log of VM {vm}", "text/plain")


def file_link(vm: str, path: str) -> Link:
    """Where a file in a VM is."""
    return Link(f"{vm_uri(vm)}/files{quote(path)}", f"{path} in VM {vm}", "application/octet-stream")


def vm_uri(vm: str) -> str:
    """Names a VM as a resource."""
    return f"volant://vms/{vm}"


TOOLS: tuple[Tool, ...] = (
    Tool(
        name="vms_list",
        title="List VMs",
        description="List the microVMs on this host with their state, size, plugin and labels, oldest first. Use it to "
        "find a VM's name, or to see what runs; for one VM whose name you know use vms_get.",
        takes=ListVms, gives=VmPage, run=_list, read_only=True,
    ),
    Tool(
        name="vms_get",
        title="Look at a VM",
        description="One VM as it is now: its `status` (pending, starting, running, paused, stopping, stopped, "
        "crashed, deleting), its size, and in `reason` why it failed, with the last lines of its console.",
        takes=GetVm, gives=VmView, run=_get, read_only=True,
    ),
    Tool(
        name="vms_create",
        title="Create a VM",
        description="Make a new Linux microVM and boot it. Answers once it runs and vms_exec works in it, usually in "
        "some seconds. `name` must be new: lower-case letters, digits and dashes. 1 CPU core and 256 MiB do for most; "
        "plugins (plugins_list) bring other software, and may need more. Without a root filesystem its files are in "
        "memory, and are lost when it stops. Give `ttl` (such as `30m`) to a VM that you need only for a while.",
        takes=MakeVm, gives=ChangedVm, run=_create,
    ),
    Tool(
        name="vms_start",
        title="Start a VM",
        description="Boot a VM that is stopped or crashed. Does nothing to one that runs.",
        takes=StartVm, gives=ChangedVm, run=_start, idempotent=True,
    ),
    Tool(
        name="vms_stop",
        title="Stop a VM",
        description="Shut a VM down and keep it for vms_start. What it has in memory is lost, and with it its files "
        'unless it has a disk (`"disk": "overlay"`). Does nothing to one that is stopped.',
        takes=StopVm, gives=ChangedVm, run=_stop, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_restart",
        title="Restart a VM",
        description="Shut a VM down and boot it again; what is lost is what vms_stop loses. For a VM that hangs, give "
        "`grace_s` 0.",
        takes=StopVm, gives=ChangedVm, run=_restart, destructive=True,
    ),
    Tool(
        name="vms_delete",
        title="Delete a VM",
        description="Destroy a VM with its disk, for good. To get it back later, use vms_stop instead.",
        takes=GetVm, gives=DeletedVm, run=_delete, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_exec",
        title="Run a command in a VM",
        description="Run one command in a running VM, wait for its end, and get its exit code and output. Each call "
        "is a process of its own: `cd` and variables do not carry over to the next. Of long output the middle is left "
        "out: write it to a file, and read parts with vms_read_file. To write a file use vms_write_file.",
        takes=Exec, gives=ExecDone, run=_exec, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_read_file",
        title="Read a file in a VM",
        description="Read a file in a running VM: text as it is, other bytes as base64. Of a long file you get the "
        "head and the tail; read on in between with `offset`. Directories: vms_exec with `ls`.",
        takes=ReadFile, gives=FileContent, run=_read, read_only=True,
    ),
    Tool(
        name="vms_write_file",
        title="Write a file in a VM",
        description="Write a whole file in a running VM, in place of what is there; readers see the old or the new "
        "one, never a half. At most some 700 KiB a call.",
        takes=WriteFile, gives=WrittenFile, run=_write, destructive=True, idempotent=True,
    ),
    Tool(
        name="vms_call_action",
        title="Call an action of a VM",
        description="Ask the workload in a running VM for one of the actions that its plugin offers, such as taking a "
        "screenshot in a browser. plugins_list says which there are and what they take.",
        takes=Action, gives=ActionDone, run=_act, destructive=True, open_world=True,
    ),
    Tool(
        name="vms_logs",
        title="Read the log of a VM",
        description="What the console (kernel and boot) and the workload of a VM have said, also of one that is "
        "stopped or has crashed. Use it to find out why a VM does not boot or its workload fails. What vms_exec "
        "runs is not in it.",
        takes=Logs, gives=LogPage, run=_logs, read_only=True,
    ),
    Tool(
        name="vms_events",
        title="See what happened to VMs",
        description="What happened to VMs, in order: created, starting, running, stopped, crashed (and why), deleted. "
        "Without `since` the newest; pass `next` of one call as `since` of the next to miss nothing, with `wait_s` to "
        "wait for something to happen.",
        takes=Events, gives=EventPage, run=_events, read_only=True,
    ),
    Tool(
        name="plugins_list",
        title="List plugins",
        description="The kinds of VMs that vms_create can make (`plugin`), and the actions that vms_call_action can "
        "call in them.",
        takes=ListPlugins, gives=PluginList, run=_plugins, read_only=True,
    ),
)  # fmt: skip
"""In the order in which they are shown."""
