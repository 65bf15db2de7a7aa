"""Every route, described for people and machines: the OpenAPI document and the page `/docs` are made from this table.

A new route needs an entry here; `tests/api/test_openapi.py` names what is missing, too many, or takes other parameters
than are said. What the code knows is not said again: bodies and answers are the structs that the routes read and
write, and `_openapi.py` adds what follows from an entry (404 where the path has a name, 413 where there is a body).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import msgspec

from volant.agui import AguiEvent, RunAgentInput
from volant.http import MAX_INTEGER, Nothing
from volant.mcp import Command, CommandAnswer, RpcAnswer, RpcMessage
from volant.model import (
    ArtifactView,
    BuildTemplate,
    ConsoleGap,
    CreateNetwork,
    CreateVm,
    Event,
    EventType,
    ForkVm,
    Health,
    LogGap,
    LogLine,
    Manifest,
    Name,
    NetworkView,
    OrphanView,
    PluginView,
    Pruned,
    Restored,
    RestoreVm,
    SnapshotView,
    Status,
    StoredKind,
    StreamGap,
    SystemStatus,
    TakeSnapshot,
    TemplateView,
    Ticket,
    Time,
    Usage,
    VmMemory,
    VmView,
    WantTicket,
)
from volant.model.agent_types import (
    ExecEnd,
    ExecGap,
    ExecHello,
    ExecOutput,
    ExecRequest,
    ExecSession,
    ExecSessions,
    Healthz,
    Info,
)

from ._plugins import Enabled

Anything = Mapping[str, Any]
"""A JSON object whose shape is no contract."""

JSON = "application/json"
SQLITE = "application/vnd.sqlite3"
ANY = "*/*"
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class Parameter:
    """One in the query, unless `place` says otherwise."""

    name: str
    kind: Any
    says: str
    repeated: bool = False
    """Given once for each value."""
    place: Literal["query", "header"] = "query"


@dataclass(frozen=True)
class OneOf:
    """A body of one of these types."""

    kinds: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """What comes when all is well. `kind` None: no body. `items`: what a line, message or event of a stream can be.

    Under the status of an error it is what comes beside `ProblemDetails`.
    """

    says: str
    kind: Any = None
    media: str = JSON
    headers: tuple[str, ...] = ()
    items: tuple[Any, ...] = ()
    streams: bool = False
    """Whether it may also come as server-sent events, one JSON object each."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One method of one path."""

    method: str
    path: str
    name: str
    """Unique; clients that are generated call it so."""
    says: str
    gives: Mapping[int | Literal["default"], Answer]
    takes: Any = None
    """The type of the body. `Nothing` may be left out."""
    parameters: tuple[Parameter, ...] = ()
    fails: tuple[int, ...] = ()
    """Statuses beside those that follow from the rest."""
    details: str = ""
    keyless: bool = False
    takes_media: str | None = field(default=None, kw_only=True)
    """Of a body that is nothing else, and must be there."""
    key_in_query: bool = field(default=False, kw_only=True)
    """Browsers open it without headers."""


PROBLEMS = {
    400: "A body that is no JSON, a wrong, unknown or missing field; an unknown, repeated or malformed parameter",
    401: "The daemon asks for an API key",
    403: "An address that is not allowed, or a foreign `Origin`",
    404: "There is none of this name",
    406: "What the client accepts is not what there is",
    408: "The body took longer than 30 s",
    409: "Not possible in the present state",
    410: "The events after that one are not kept",
    412: "The VM has changed since `If-Match`",
    413: "The body is larger than 1 MiB, or than what the route takes",
    415: "The body is not JSON",
    416: "The file has no such range",
    421: "`Host` is not a name of this daemon",
    422: "The `Idempotency-Key` was used for another request, or members of the body contradict each other",
    426: "This is a WebSocket",
    502: "The guest, its agent or its port does not answer",
    503: "The daemon can't now: no capacity, it stops, or its disk does not take the change",
    507: "The disk is full: that of the guest, or the cache's",
}
"""What each error status says; the body is always `ProblemDetails`."""

HEADERS = {
    "Content-Disposition": "A name for the file",
    "Repr-Digest": "`sha-256=:…:` (RFC 9530)",
    "Volant-File-Mode": "The mode, octal",
    "ETag": "Changes with every change of the VM, or of the file; for `If-Match` and `If-None-Match`",
    "Location": "The path of what was made",
    "Volant-Wait": "With `wait`: `met`, `failed` (it came to rest in another state, or is gone) or `timeout`",
    "Volant-Event-Id": "The event up to which the list is true: follow the events from there and miss nothing",
    "Idempotency-Replayed": "`true` when the request came before: nothing was done now, and this is the first answer",
    "Link": '`<…>; rel="next"` when there are more',
}

TAGS = {
    "VMs": "Make, change and watch VMs",
    "Inside a VM": "The agent, the workload and ports of a guest. Path, query and bodies pass byte for byte",
    "Plugins": "Kinds of VMs",
    "Templates": "What VMs begin as clones of",
    "Snapshots": "Copies of VMs that are kept, to go on from",
    "Networks": "Named networks in which VMs reach each other",
    "System": "The daemon about itself",
}

_ANSWERED_VM = Answer("The VM as it now is", VmView, headers=("ETag", "Volant-Wait"))
_COMMAND_ANSWER = Answer("The VM", VmView, headers=("ETag", "Volant-Wait", "Idempotency-Replayed"))
_STATES = Literal["pending", "starting", "running", "paused", "stopping", "stopped", "crashed", "deleting", "deleted"]
_TEN_MINUTES = Annotated[
    str,
    msgspec.Meta(
        extra_json_schema={
            "pattern": "^(0{0,6}([0-9]{1,5}|[1-5][0-9]{5}|600000)ms|0{0,9}([0-9]{1,2}|[1-5][0-9]{2}|600)s"
            "|0{0,10}([0-9]|10)m|0{1,12}[hd])$"
        }
    ),
]
"""A duration of at most that, for the schema alone."""
_DURATION = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[0-9]{1,12}(ms|s|m|h|d)$"})]
_WAIT = (
    Parameter(
        "wait",
        Annotated[list[_STATES], msgspec.Meta(min_length=1)],
        "Answer once the VM is in, or since the request was in, one of these states",
    ),
    Parameter("timeout", _TEN_MINUTES, "How long to wait: default `60s`, at most `10m`"),
)
_IF_MATCH = Parameter(
    "If-Match", Annotated[str, msgspec.Meta(min_length=1)], "Only if the VM's `ETag` is one of these", place="header"
)
_ONCE = Parameter(
    "Idempotency-Key",
    Annotated[str, msgspec.Meta(pattern="^[!-~]{1,255}$")],
    "With the same key the request can be sent again and is done once; the first answer counts for 24 h",
    place="header",
)
_GRACE = Parameter("grace", _TEN_MINUTES, "How long the guest has before it is killed: default `10s`, at most `10m`")
_LABEL = Parameter(
    "label", Annotated[str, msgspec.Meta(pattern="^[^=]+=")], "`key=value`; all of them must hold", repeated=True
)
_VM = "/api/v1/vms/{name}"


def _command(name: str, says: str, *parameters: Parameter) -> Operation:
    return Operation(
        "POST",
        f"{_VM}/{name}",
        f"{name}_vm",
        says,
        {200: _COMMAND_ANSWER},
        takes=Nothing,
        parameters=(*_WAIT, *parameters, _IF_MATCH, _ONCE),
        fails=(409, 412, 422, 503),
    )


def _relayed(what: str, path: str, says: str) -> tuple[Operation, ...]:
    answers: Mapping[int | Literal["default"], Answer] = {"default": Answer("What the guest answers", bytes, ANY)}
    details = "WebSockets too. The last part of the path may have slashes, and may be empty."
    return tuple(
        Operation(
            method,
            path,
            f"{method.lower()}_{what}",
            says,
            answers,
            takes=bytes if method in ("POST", "PUT", "PATCH") else None,
            fails=(409, 502),
            details=details,
        )
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    )


def _devtools(method: str, path: str, name: str, says: str, answer: Answer, *fails: int) -> Operation:
    answers: Mapping[int | Literal["default"], Answer] = {200 if answer.kind is not None else 101: answer}
    path = f"/ws/v1/vms/{{name}}/devtools/{path}"
    return Operation(method, path, name, says, answers, fails=(409, 502, 503, *fails), key_in_query=True)


_CDP = Answer("Messages of the Chrome DevTools Protocol, byte for byte")
_DONE = Answer("Done, in the browser's words", str, "text/plain")
_DEVTOOLS = (
    _devtools("GET", "json/version", "devtools_version", "The browser in a VM, and where it is controlled",
              Answer("Its `webSocketDebuggerUrl` leads through this daemon", Anything)),
    _devtools("GET", "json/list", "devtools_list", "The pages of the browser",
              Answer("Each with its `webSocketDebuggerUrl` and `devtoolsFrontendUrl`", list[Anything])),
    _devtools("GET", "json", "devtools_json", "The same", Answer("As of `json/list`", list[Anything])),
    _devtools("PUT", "json/new", "devtools_new", "Open a page; the query is its address, percent-encoded",
              Answer("The page", Anything)),
    _devtools("GET", "json/protocol", "devtools_protocol", "The protocol that the browser speaks",
              Answer("Its domains, commands and types, as the browser has them", Anything)),
    _devtools("GET", "json/activate/{target}", "devtools_activate", "Bring a page to the front", _DONE),
    _devtools("GET", "json/close/{target}", "devtools_close", "Close a page", _DONE),
    _devtools("GET", "browser", "devtools_websocket", "Control the browser (WebSocket)", _CDP, 426),
    _devtools("GET", "browser/{target}", "devtools_browser_websocket", "The same, by the browser's id (WebSocket)",
              _CDP, 426),
    _devtools("GET", "page/{target}", "devtools_page_websocket", "Control a page (WebSocket)", _CDP, 426),
)  # fmt: skip

_FILE_HEADERS = ("ETag", "Volant-File-Mode")

_LOG_PARAMETERS = (
    Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1_000_000)], "The last so many lines of the chosen streams"),
    Parameter(
        "since",
        Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)] | Time,
        "After this `seq`, or from this time on; wins over `tail`",
    ),
    Parameter("follow", bool, "Whether to go on with new lines"),
    Parameter(
        "stream", Annotated[list[Literal["stdout", "stderr", "console"]], msgspec.Meta(min_length=1)], "Default: all"
    ),
    Parameter(
        "vm_id",
        Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)],
        "Of a VM of that name, deleted within the last 24 h",
    ),
)

OPERATIONS: tuple[Operation, ...] = (
    # VMs
    Operation(
        "GET", "/api/v1/vms", "list_vms", "List VMs, by id",
        {200: Answer("All that fit, unless there is a `limit`", list[VmView], headers=("Volant-Event-Id", "Link"))},
        parameters=(
            Parameter("status", Annotated[list[Status], msgspec.Meta(min_length=1)], "In one of these states"),
            Parameter("plugin", Name, "Of one of these plugins", repeated=True),
            _LABEL,
            Parameter("limit", Annotated[int, msgspec.Meta(ge=1, le=1000)], "At most so many"),
            Parameter("cursor", Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)], "As in the `Link` before; opaque"),
        ),
    ),
    Operation(
        "POST", "/api/v1/vms", "create_vm", "Make a VM; it is durable when this is answered",
        {201: Answer("The VM, usually `pending`", VmView,
                     headers=("Location", "ETag", "Volant-Wait", "Idempotency-Replayed"))},
        takes=OneOf((CreateVm, RestoreVm)), parameters=(*_WAIT, _ONCE), fails=(404, 409, 422, 503),
        details="With `from_snapshot` its first boot goes on from there, as a copy that is told who it is; every later "
        "one is an ordinary one, with the disk as it was left. If that fails it is `crashed`; no cold boot follows.",
    ),
    Operation(
        "GET", _VM, "get_vm", "A VM",
        {200: _ANSWERED_VM, 304: Answer("The client has it already", headers=("ETag",))},
        parameters=(*_WAIT, Parameter("If-None-Match", str, "The `ETag` of what the client has", place="header")),
    ),
    Operation(
        "DELETE", _VM, "delete_vm", "Delete a VM",
        {204: Answer("Nothing of it is left on the host")},
        takes=Nothing, parameters=(_IF_MATCH,), fails=(412, 503),
        details="A second one joins the first. A client that leaves cancels nothing; past 60 s it is 503.",
    ),
    _command("start", "Start a VM; on one that runs, nothing happens"),
    _command("stop", "Ask the guest to stop, then kill it; on one that is stopped, nothing happens", _GRACE),
    _command("restart", "Stop a VM and start it again", _GRACE),
    _command("pause", "Let the guest stand still, once it runs; its memory, its process and open streams stay"),
    _command("resume", "Let a paused guest go on, with its clock set"),
    _command("recover", "Take up a VM again whose reason is `control_lost`"),
    Operation(
        "POST", f"{_VM}/fork", "fork_vm", "Make VMs that go on from where this one is; it goes on itself",
        {201: Answer("The new VMs, usually `pending`; durable", list[VmView],
                     headers=("Volant-Wait", "Idempotency-Replayed"))},
        takes=ForkVm, parameters=(*_WAIT, _ONCE), fails=(409, 422, 503),
        details="Each has the memory and disk of this one, and is told who it is before it is `running`. The VM has to "
        "be running or paused. With `wait`, `Volant-Wait` is `met` when it is for all.",
    ),
    # Snapshots
    Operation(
        "POST", f"{_VM}/snapshots", "take_snapshot", "Keep a VM as it is now: memory, devices and disk",
        {201: Answer("The snapshot, `ready` and on the disk", SnapshotView,
                     headers=("Location", "Idempotency-Replayed"))},
        takes=TakeSnapshot, parameters=(_ONCE,), fails=(409, 422, 503),
        details="The guest stands still for a moment, and what is copied then is written to the disk while it goes on. "
        "Who leaves cancels nothing. The VM has to be running or paused; a command that ends that ends this too.",
    ),
    Operation(
        "GET", f"{_VM}/snapshots", "list_vm_snapshots", "List the snapshots of a VM",
        {200: Answer("The oldest first", list[SnapshotView])},
    ),
    Operation(
        "GET", "/api/v1/snapshots", "list_snapshots", "List all snapshots, also those of VMs that are gone",
        {200: Answer("The oldest first", list[SnapshotView])},
    ),
    Operation(
        "GET", "/api/v1/snapshots/{snapshot}", "get_snapshot", "A snapshot",
        {200: Answer("The snapshot", SnapshotView)},
    ),
    Operation(
        "DELETE", "/api/v1/snapshots/{snapshot}", "remove_snapshot", "Remove a snapshot; VMs made from it go on",
        {204: Answer("Nothing of it is left")}, takes=Nothing, fails=(409, 503),
    ),
    Operation(
        "GET", f"{_VM}/inspect", "inspect_vm", "For those who look for a fault; its shape is no contract",
        {200: Answer("What is known", Anything)},
    ),
    Operation(
        "GET", f"{_VM}/memory", "vm_memory", "What a VM takes of memory, as its guest and as the host sees it",
        {200: Answer("Measured now", VmMemory)}, fails=(409, 503),
        details="Costs the kernel some milliseconds for each GiB, so it is not for every second. 409: there is no "
        "process.",
    ),
    Operation(
        "GET", "/api/v1/events/vms", "vm_events", "What happens to VMs, as it happens",
        {200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
        parameters=(
            Parameter("since", str, "After this event; `0` for the oldest kept"),
            Parameter("last_event_id", str, "After this event; wins over `since`"),
            Parameter("Last-Event-ID", str, "After this event; wins over both", place="header"),
            Parameter("vm", Name, "Of this VM"),
            Parameter("types", Annotated[list[EventType], msgspec.Meta(min_length=1)], "Of these types"),
            _LABEL,
            Parameter("on_gap", Literal["410"], "410 instead of a `STREAM_GAP` when events are not kept"),
        ),
        fails=(410,), key_in_query=True,
    ),
    Operation(
        "GET", f"{_VM}/logs", "vm_logs", "What the console and the workload said",
        {200: Answer("One JSON object a line", str, "application/x-ndjson", items=(LogLine, LogGap))},
        parameters=_LOG_PARAMETERS, fails=(503,),
        details="By default everything that is kept, without following.",
    ),
    Operation(
        "GET", "/ws/v1/vms/{name}/logs", "vm_logs_websocket", "The same as a WebSocket",
        {101: Answer("One JSON object a text message", items=(LogLine, LogGap))},
        parameters=_LOG_PARAMETERS, fails=(426, 503), key_in_query=True,
        details="By default the last 100 lines, and following. Closes with 1000 when the VM is deleted or the wanted "
        "part is through, with 1001 when the daemon stops.",
    ),
    Operation(
        "POST", "/api/v1/agui", "agui", "What happens to VMs, as an AG-UI run",
        {200: Answer("Server-sent events, one AG-UI event each", str, "text/event-stream", items=get_args(AguiEvent))},
        takes=RunAgentInput,
        parameters=(
            Parameter("vm", Name, "Of this VM alone: the run is its boot, and ends with it"),
            Parameter("duration", _TEN_MINUTES, "The run ends after it: default `60s` without `vm`, at most `10m`"),
        ),
        fails=(404,),
    ),
    Operation(
        "GET", "/ws/v1/agui", "agui_websocket", "The same as a WebSocket",
        {101: Answer("One AG-UI event a text message", items=get_args(AguiEvent))},
        parameters=(
            Parameter("vm", Name, "Of this VM alone: each of its boots is a run"),
            Parameter("thread_id", str, "Of the runs; at most 200 characters"),
            Parameter("run_id", str, "Of the first run; at most 200 characters"),
            Parameter("resume", bool, "That run has begun on an earlier connection, and goes on"),
            Parameter("step", str, "With `resume` and `vm`: the step that the client has open, empty for none"),
        ),
        fails=(404, 426), key_in_query=True,
        details="Closes with 1000 when the VM of `vm` is deleted, with 1001 when the daemon stops.",
    ),
    Operation(
        "POST", "/api/v1/mcp", "mcp", "The Model Context Protocol, and commands in a form of our own",
        {
            200: Answer("The answer to a request, or to a command", OneOf((RpcAnswer, CommandAnswer)), streams=True),
            202: Answer("A notification or an answer was taken"),
            **{
                status: Answer("The protocol's own errors", RpcAnswer)
                for status in (400, 404, 406, 413, 415)
            },
        },
        takes=OneOf((RpcMessage, Command)), fails=(404, 406, 503),
        details="Streamable HTTP, without sessions: 2026-07-28, where each request has the headers "
        "`MCP-Protocol-Version` and `Mcp-Method`, and versions that begin with `initialize`. An object with `command` "
        "and without `jsonrpc` is a command; its failures are answered with 200 and `error`.",
    ),
    # Inside a VM
    Operation(
        "GET", f"{_VM}/agent/healthz", "agent_healthz", "The agent and its workload",
        {200: Answer("The agent has answered", Healthz)}, fails=(409, 502),
    ),
    Operation(
        "GET", f"{_VM}/agent/v1/info", "agent_info", "The guest",
        {200: Answer("Kernel, uptime, memory, workload", Info)}, fails=(409, 502),
    ),
    Operation(
        "POST", f"{_VM}/agent/v1/exec", "agent_exec", "Run a command in the guest",
        {200: Answer("One JSON object a line, the last an `ExecEnd`", str, "application/x-ndjson",
                     items=(ExecOutput, ExecEnd))},
        takes=ExecRequest, fails=(409, 502, 503), details="A client that leaves ends the command.",
    ),
    Operation(
        "GET", f"{_VM}/agent/v1/exec", "agent_exec_websocket", "Run a command and talk to it, as a WebSocket",
        {101: Answer("Binary messages: a byte for the channel, and bytes. Texts: JSON, the last an `ExecEnd`",
                     items=(ExecHello, ExecGap, ExecEnd))},
        parameters=(
            Parameter("detach", bool, "The command goes on when the client leaves; the first message says its `id`"),
            Parameter("attach", str, "Go on with the detached command of this `id`; who was attached gets code 4000"),
            Parameter("from", Annotated[int, msgspec.Meta(ge=0, le=10**15 - 1)],
                      "With `attach`: the `position` up to which the output is known; default: all that is kept"),
        ),
        fails=(409, 426, 502, 503), key_in_query=True,
        details="First a text message, the body of `POST` with `tty`, `rows` and `cols` besides. Then channel 0 is "
        "standard input, 1 and 2 are standard output and error, and a channel without bytes is its end. A client may "
        'send the texts `{"resize":[rows,cols]}` and `{"signal":n}`. A client that leaves ends the command unless it '
        "is detached. Closes with 1000 after the last text, 1002, 1007, 1008 or 1009 when a client breaks the rules "
        "(a message has at most 1 MiB), 1001 when the daemon stops.",
    ),
    Operation(
        "GET", f"{_VM}/agent/v1/exec/sessions", "agent_exec_sessions", "The detached commands",
        {200: Answer("At most 16, the oldest first; one that has ended is kept for 10 minutes", ExecSessions)},
        fails=(409, 502, 503),
    ),
    Operation(
        "GET", f"{_VM}/agent/v1/exec/sessions/{{id}}", "agent_exec_session", "A detached command",
        {200: Answer("The command", ExecSession)}, fails=(409, 502, 503),
    ),
    Operation(
        "DELETE", f"{_VM}/agent/v1/exec/sessions/{{id}}", "end_agent_exec_session", "Kill and forget a command",
        {204: Answer("Its whole session has been killed")}, fails=(409, 502, 503),
    ),
    Operation(
        "GET", f"{_VM}/agent/v1/files/{{path}}", "read_file", "A file of the guest, or a directory as tar",
        {
            200: Answer("The bytes; a directory is `application/x-tar`", bytes, ANY, headers=_FILE_HEADERS),
            206: Answer("The part that `Range` asks for", bytes, ANY, headers=_FILE_HEADERS),
            304: Answer("The client has it already", headers=_FILE_HEADERS),
        },
        parameters=(
            Parameter("Range", str, "`bytes=FIRST-LAST`, one range of a file", place="header"),
            Parameter("If-Range", str, "The range only if the file still has this `ETag`", place="header"),
            Parameter("If-None-Match", str, "The `ETag` of what the client has", place="header"),
        ),
        fails=(403, 409, 416, 502, 503), details="HEAD too. The path is absolute, without its first slash.",
    ),
    Operation(
        "PUT", f"{_VM}/agent/v1/files/{{path}}", "write_file", "Write a file, or unpack a tar into a directory",
        {201: Answer("It is new", headers=("ETag",)), 204: Answer("It was there", headers=("ETag",))},
        takes=bytes,
        parameters=(
            Parameter("mode", Annotated[str, msgspec.Meta(pattern="^[0-7]{1,5}$")],
                      "Of a file, octal: default that of the file before, else `0644`"),
            Parameter("user", str, "Who owns it, perhaps with `:GROUP`: default who did, or whom a tar says, or root"),
        ),
        fails=(403, 409, 413, 415, 502, 503, 507),
        details="With `Content-Type: application/x-tar` the body is unpacked into the directory, else it is the file. "
        "A file, and a directory that is new, is there whole or not at all. Of any length.",
    ),
    Operation(
        "DELETE", f"{_VM}/agent/v1/files/{{path}}", "delete_file", "Delete a file or a directory",
        {204: Answer("It is gone")},
        parameters=(Parameter("recursive", bool, "A directory with all that is in it"),),
        fails=(403, 409, 502, 503),
    ),
    Operation(
        "GET", "/ws/v1/vms/{name}/console", "vm_console", "The serial console, as a WebSocket",
        {101: Answer("Binary messages are the console's bytes, both ways", items=(ConsoleGap,))},
        parameters=(
            Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1000)], "First the last so many lines: default 25"),
            Parameter("write", bool, "To type: 409 while somebody else does"),
            Parameter("take", bool, "To type, and take the keyboard from whoever has it"),
        ),
        fails=(409, 426, 503), key_in_query=True,
        details="What a client sends, in binary or in text, is typed. A text message from the daemon is a "
        "`ConsoleGap`. Closes with 1000 when the VM is down or deleted, 1001 when the daemon stops, 1008 when one "
        "types without `write`, 1009 for a message over 64 KiB, 1012 when the console is taken up again (connect "
        "again), 1013 when the guest does not read, 4000 when somebody else took the keyboard.",
    ),
    Operation(
        "GET", "/ws/v1/vms/{name}/tcp/{port}", "vm_tcp", "One TCP connection to a port of the guest's loopback",
        {101: Answer("Binary messages are the bytes, both ways; an empty one is the end of its direction")},
        fails=(409, 426, 502), key_in_query=True,
        details="Messages of a client have at most 64 KiB. Closes with 1000 when both directions have ended, 1001 when "
        "the daemon stops, 1002 for bytes after the end, 1003 for text, 1009 for a message over 64 KiB, 1011 when the "
        "connection breaks.",
    ),
    *_relayed("agent", f"{_VM}/agent/{{path}}", "A route of the agent or, if it has none, of the workload"),
    *_relayed("port", f"{_VM}/ports/{{port}}/{{path}}", "HTTP to a port of the guest's loopback"),
    *_DEVTOOLS,
    Operation(
        "POST", f"{_VM}/actions/{{plugin}}/{{action}}", "call_action", "Let the workload do what its manifest names",
        {"default": Answer("What the workload answers", bytes, ANY)}, takes=bytes, fails=(409, 502),
        details="Body, content type and query go to the workload, with the method and the path of the manifest.",
    ),
    Operation(
        "GET", f"{_VM}/openapi", "workload_openapi", "The workload's own OpenAPI document",
        {200: Answer("With its servers reached through the daemon", Anything)}, fails=(502,),
        details="A running workload is asked first, at the path of the manifest or at `/openapi.json`; if it has none "
        "that is fit, the manifest's own counts.",
    ),
    # Plugins
    Operation("GET", "/api/v1/plugins", "list_plugins", "List plugins", {200: Answer("All", list[PluginView])}),
    Operation(
        "POST", "/api/v1/plugins", "install_plugin", "Install a plugin from its manifest",
        {201: Answer("Installed", PluginView, headers=("Location", "Idempotency-Replayed"))},
        takes=Manifest, parameters=(_ONCE,), fails=(409, 422, 503, 507),
        details="`boot` may name files of the daemon's host by path: below a directory of the setting `artifact_dirs`; "
        "or, at a Unix socket, and without a key for the daemon's own user over loopback, what the client's user can "
        "read. These are taken into the cache before the answer. Else it is 403 `artifact-not-allowed` or 400 "
        "`artifact-unavailable`: send the file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin.",
    ),
    Operation(
        "PUT", "/api/v1/artifacts/{sha256}", "put_artifact", "Send a file that a manifest names",
        {201: Answer("It is in the cache, and stays until it is pruned, which happens to none that a plugin names",
                     ArtifactView)},
        takes=bytes, takes_media="application/octet-stream", fails=(408, 413, 503, 507),
        details="400 `artifact-mismatch` when what comes has another SHA-256. At most `artifact_max_mb`; four at a "
        "time, for one more it is 503.",
    ),
    Operation("GET", "/api/v1/plugins/{name}", "get_plugin", "A plugin", {200: Answer("The plugin", PluginView)}),
    Operation(
        "DELETE", "/api/v1/plugins/{name}", "remove_plugin", "Remove a plugin that no VM uses",
        {204: Answer("Removed")}, takes=Nothing, fails=(409, 503),
    ),
    Operation(
        "GET", "/api/v1/plugins/{name}/manifest", "get_manifest", "What a plugin was installed from",
        {200: Answer("The manifest", Manifest)},
    ),
    Operation(
        "POST", "/api/v1/plugins/{name}/enabled", "enable_plugin", "Let new VMs use a plugin, or not",
        {200: Answer("The plugin", PluginView, headers=("Idempotency-Replayed",))},
        takes=Enabled, parameters=(_ONCE,), fails=(409, 422, 503),
    ),
    # Networks
    Operation(
        "GET", "/api/v1/networks", "list_networks", "List networks in which VMs reach each other",
        {200: Answer("By name", list[NetworkView])},
    ),
    Operation(
        "POST", "/api/v1/networks", "create_network", "Make a network",
        {201: Answer("It is there", NetworkView, headers=("Location", "Idempotency-Replayed"))},
        takes=CreateNetwork, parameters=(_ONCE,), fails=(409, 422, 503),
        details="VMs that are created with its name as `network` are in it, and reach each other there, by their "
        "names.",
    ),
    Operation(
        "GET", "/api/v1/networks/{name}", "get_network", "A network, and the VMs in it",
        {200: Answer("The network", NetworkView)},
    ),
    Operation(
        "DELETE", "/api/v1/networks/{name}", "remove_network", "Remove a network that no VM is in",
        {204: Answer("Removed")}, takes=Nothing, fails=(409, 503),
    ),
    # Templates
    Operation(
        "GET", "/api/v1/templates", "list_templates", "List what VMs begin as clones of",
        {200: Answer("All, also those that are being built or could not be", list[TemplateView])}, fails=(503,),
    ),
    Operation(
        "POST", "/api/v1/templates", "build_template", "Build the template of a kind of VM, and wait for it",
        {201: Answer("It is there", TemplateView)}, takes=BuildTemplate, fails=(404, 409, 422, 503),
        details="One that is there is that; one that is being built is waited for. Who leaves cancels nothing.",
    ),
    Operation(
        "DELETE", "/api/v1/templates/{digest}", "remove_template", "Remove a template; its clones go on",
        {204: Answer("Removed")}, takes=Nothing, fails=(404, 503),
    ),
    # System
    Operation(
        "GET", "/healthz", "healthz", "Whether the daemon is whole",
        {200: Answer("It is", Health), 503: Answer("It starts, stops or is degraded", Health)}, keyless=True,
    ),
    Operation(
        "GET", "/api/v1/system/status", "system_status", "Figures of the daemon and its host",
        {200: Answer("Measured now", SystemStatus)},
    ),
    Operation(
        "GET", "/api/v1/system/tasks", "system_tasks", "What every task and thread of the daemon is doing",
        {200: Answer("Where each one waits: for people, its shape is no contract", str, "text/plain")},
        details="Files, lines and functions, and no values. Also in the log, after `SIGUSR1`.",
    ),
    Operation(
        "POST", "/api/v1/system/drain", "drain", "Let no VM be made or start, for maintenance",
        {200: Answer("Durable, over restarts of the daemon and of the host", SystemStatus)}, takes=Nothing,
        parameters=(
            Parameter("stop_vms", bool, "Stop VMs that are up, some at a time; they start again after `undrain`"),
            Parameter("grace", _TEN_MINUTES, "With `stop_vms`, for each guest: default `10s`, at most `10m`"),
        ),
        fails=(503,),
        details="What would make or start a VM is 503, `urn:volant:error:draining`. VMs that run go on. One whose "
        "restart policy is due, or whose host or guest has rebooted, waits. Asked again, `draining_since` stays. The "
        "answer comes before VMs have stopped: their events, or `GET /api/v1/vms/{name}?wait=stopped`, tell of that.",
    ),
    Operation(
        "POST", "/api/v1/system/undrain", "undrain", "Let VMs start again; those that waited do",
        {200: Answer("Durable", SystemStatus)}, takes=Nothing, fails=(503,),
    ),
    Operation(
        "GET", "/api/v1/system/info", "system_info", "Versions, addresses, accelerator and why",
        {200: Answer("Its shape is no contract", Anything)},
    ),
    Operation(
        "GET", "/api/v1/system/orphans", "list_orphans", "Hypervisors that run and that no VM owns",
        {200: Answer("All of them", list[OrphanView])},
        details="They are never touched by themselves. One is adopted, or killed, by whoever says so.",
    ),
    Operation(
        "POST", "/api/v1/system/orphans/{mark}/adopt", "adopt_orphan", "Make a VM of one",
        {201: Answer("The VM, running, under its old id", VmView, headers=("ETag", "Location"))},
        takes=Nothing, parameters=(Parameter("name", Name, "Instead of its own name"),), fails=(404, 409, 503),
        details="Name, size and disk are as its command line says; plugin `base`, no labels, no restart policy.",
    ),
    Operation(
        "POST", "/api/v1/system/orphans/{mark}/kill", "kill_orphan", "End one; its disk stays",
        {204: Answer("Its process and its files are gone")}, takes=Nothing, fails=(404, 503),
    ),
    Operation(
        "GET", "/api/v1/system/tree", "system_tree", "The supervisor tree",
        {200: Answer("Its shape is no contract", Anything)},
    ),
    Operation(
        "GET", "/api/v1/system/df", "disk_usage", "What takes space on the host for the daemon",
        {200: Answer("The largest first, with who uses it", Usage)}, fails=(503,),
    ),
    Operation(
        "POST", "/api/v1/system/prune", "prune", "Remove what nobody uses",
        {200: Answer("What is gone, or with `dry_run` would be", Pruned)}, takes=Nothing,
        parameters=(
            Parameter("dry_run", bool, "Say what would go, and remove nothing"),
            Parameter("kind", Annotated[list[StoredKind], msgspec.Meta(min_length=1)],
                      "Only these; default `log`, `image`, `medium`, `template`, `leftover`; "
                      "`disk`, `snapshot`, `database` only when named"),
            Parameter("unused_for", _DURATION, "Of templates only those from which no VM began for so long: `12h`"),
        ),
        fails=(503,),
        details="What a VM, a plugin or a process uses stays, also when that begins meanwhile.",
    ),
    Operation(
        "POST", "/api/v1/system/backup", "backup", "A consistent copy of all that the daemon must not lose",
        {200: Answer("An SQLite database: VMs, plugins, events, kept answers; no disks, no logs", bytes, SQLITE,
                     headers=("Content-Disposition", "Repr-Digest"))},
        takes=Nothing, fails=(409, 503),
        details="Commits and readers go on meanwhile. `Content-Length` and `Repr-Digest` tell whether it came whole.",
    ),
    Operation(
        "POST", "/api/v1/system/restore", "restore", "Go on with a backup",
        {202: Answer("It is looked through and decided: the daemon ends all connections and begins anew", Restored)},
        takes=bytes, takes_media=SQLITE,
        parameters=(Parameter("replace", bool, "Also when there are VMs that the backup does not know"),),
        fails=(408, 409, 413, 503),
        details="VMs go on running. What the daemon knows of a VM that both know stays as it is.",
    ),
    Operation(
        "POST", "/api/v1/tickets", "create_ticket", "For browsers, which can't set headers on some streams",
        {201: Answer("For one use", Ticket)}, takes=WantTicket,
    ),
    Operation(
        "GET", "/metrics", "metrics", "For Prometheus",
        {200: Answer("Text 0.0.4; OpenMetrics for those who ask", str, "text/plain")},
    ),
    Operation(
        "GET", "/openapi.json", "openapi", "This document",
        {200: Answer("OpenAPI 3.1", Anything)},
    ),
    Operation(
        "GET", "/docs", "docs", "This document for people; needs no network",
        {200: Answer("A page", str, "text/html")}, keyless=True,
    ),
)  # fmt: skip
