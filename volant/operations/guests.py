"""Access to VMs: agent, files, console, ports, browser and workload. Adapters implement nearly all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlencode

import msgspec

from volant.model import ConsoleGap, OpenPort, Permission, PortOriginView, Problem
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

from ._context import Context
from ._lookup import find_vm
from ._parameters import Parameter
from ._table import ANY, TABLE, Answer, JsonObject

_VM = "/api/v1/vms/{name}"
_USE = Permission.USE

TABLE.declare(
    f"GET {_VM}/agent/healthz",
    "agent_healthz",
    _USE,
    "Check the health of the agent and the workload",
    answers={200: Answer("The agent's health", Healthz)},
    errors=(409, 502),
    each_minute=True,
)
TABLE.declare(
    f"GET {_VM}/agent/v1/info",
    "agent_info",
    _USE,
    "Show information about the guest",
    answers={200: Answer("Kernel, uptime, memory, workload", Info)},
    errors=(409, 502),
    each_minute=True,
)
TABLE.declare(
    f"POST {_VM}/agent/v1/exec",
    "agent_exec",
    _USE,
    "Run a command in the guest",
    answers={
        200: Answer(
            "One JSON object per line, the last one an `ExecEnd`",
            str,
            "application/x-ndjson",
            items=(ExecOutput, ExecEnd),
        )
    },
    body=ExecRequest,
    examples={
        "A command": {"command": ["uname", "-a"]},
        "A shell": {"command": ["sh", "-c", "ls | wc -l"], "cwd": "/etc", "timeout_s": 10},
    },
    errors=(409, 502, 503),
    details="The command ends if the client disconnects.",
)
TABLE.declare(
    f"GET {_VM}/agent/v1/exec",
    "agent_exec_websocket",
    _USE,
    "Run an interactive command (WebSocket)",
    answers={
        101: Answer(
            "Binary messages: one byte for the channel, then data. Text messages: JSON, the last one an `ExecEnd`",
            items=(ExecHello, ExecGap, ExecEnd),
        )
    },
    documented=(
        Parameter(
            "detach", bool, "Keep the command running when the client disconnects; the first message has its `id`"
        ),
        Parameter(
            "attach", str, "Attach to the detached command with this `id`; its previous client is closed with 4000"
        ),
        Parameter(
            "workload",
            bool,
            "Start the program of a VM that was created with `attach`, and attach to it; its `id` is `workload`",
        ),
        Parameter(
            "from",
            Annotated[int, msgspec.Meta(ge=0, le=10**15 - 1)],
            "With `attach`: the `position` after which output is wanted; default: all stored output",
        ),
    ),
    errors=(409, 426, 502, 503),
    credentials_in_query=True,
    details="The first message is a text: the body of `POST`, with `tty`, `rows` and `cols` in addition. Then channel "
    "0 is standard input, and 1 and 2 are standard output and error; a message without data ends its channel. A client "
    'may send the texts `{"resize":[rows,cols]}` and `{"signal":n}`. If the client disconnects, the command ends '
    "unless it is detached. Close codes: 1000 after the last text; 1002, 1007, 1008 or 1009 for invalid messages "
    "(a message has at most 1 MiB); 1001 when the daemon stops. With `workload` the first message has only `env`, "
    "`tty`, `rows` and `cols`; the output also goes into the VM's log, and the program keeps running when the client "
    "disconnects.",
)
TABLE.declare(
    f"GET {_VM}/agent/v1/exec/sessions",
    "agent_exec_sessions",
    _USE,
    "List the detached commands",
    answers={
        200: Answer("At most 16 commands, oldest first; an ended one is listed for 10 minutes", ExecSessions),
    },
    errors=(409, 502, 503),
    each_minute=True,
)
TABLE.declare(
    f"GET {_VM}/agent/v1/exec/sessions/{{id}}",
    "agent_exec_session",
    _USE,
    "Get a detached command",
    answers={200: Answer("The command", ExecSession)},
    errors=(409, 502, 503),
    each_minute=True,
)
TABLE.declare(
    f"DELETE {_VM}/agent/v1/exec/sessions/{{id}}",
    "end_agent_exec_session",
    _USE,
    "Kill and remove a detached command",
    answers={204: Answer("All processes of its session are killed")},
    errors=(409, 502, 503),
)

_FILE_HEADERS = ("ETag", "Volant-File-Mode")

TABLE.declare(
    f"GET {_VM}/agent/v1/files/{{path}}",
    "read_file",
    _USE,
    "Read a file of the guest, or a directory as tar",
    answers={
        200: Answer("The bytes; a directory is `application/x-tar`", bytes, ANY, headers=_FILE_HEADERS),
        206: Answer("The part requested by `Range`", bytes, ANY, headers=_FILE_HEADERS),
        304: Answer("The client's copy is current", headers=_FILE_HEADERS),
    },
    documented=(
        Parameter("Range", str, "`bytes=FIRST-LAST`, one range of a file", place="header"),
        Parameter("If-Range", str, "Return the range only if the file still has this `ETag`", place="header"),
        Parameter("If-None-Match", str, "The `ETag` of the client's copy", place="header"),
    ),
    errors=(403, 409, 416, 502, 503),
    details="`HEAD` works too. The path is absolute, without its first slash.",
)
TABLE.declare(
    f"PUT {_VM}/agent/v1/files/{{path}}",
    "write_file",
    _USE,
    "Write a file, or unpack a tar into a directory",
    answers={201: Answer("Created", headers=("ETag",)), 204: Answer("Replaced", headers=("ETag",))},
    body=bytes,
    documented=(
        Parameter(
            "mode",
            Annotated[str, msgspec.Meta(pattern="^[0-7]{1,5}$")],
            "The mode of a file, in octal. Defaults to the mode of the replaced file, otherwise `0644`",
        ),
        Parameter(
            "user",
            str,
            "The owner, optionally with `:GROUP`. Defaults to the replaced file's owner, the owner in the tar, or root",
        ),
    ),
    errors=(403, 409, 413, 415, 502, 503, 507),
    details="With `Content-Type: application/x-tar` the body is unpacked into the directory, otherwise it is the file. "
    "Files and new directories are written atomically. The length is not limited.",
)
TABLE.declare(
    f"DELETE {_VM}/agent/v1/files/{{path}}",
    "delete_file",
    _USE,
    "Delete a file or a directory",
    answers={204: Answer("Deleted")},
    documented=(Parameter("recursive", bool, "Delete a directory with its content"),),
    errors=(403, 409, 502, 503),
)
TABLE.declare(
    "GET /ws/v1/vms/{name}/console",
    "vm_console",
    _USE,
    "Use the serial console (WebSocket)",
    answers={101: Answer("Binary messages with the console's bytes, in both directions", items=(ConsoleGap,))},
    documented=(
        Parameter(
            "tail", Annotated[int, msgspec.Meta(ge=0, le=1000)], "Number of earlier lines to send first; default 25"
        ),
        Parameter("write", bool, "Allow input; 409 while another client may type"),
        Parameter("take", bool, "Allow input, and disconnect the client that may type"),
    ),
    errors=(409, 426, 503),
    credentials_in_query=True,
    details="Messages of the client, binary or text, are typed. A text message from the daemon is a `ConsoleGap`. "
    "Close codes: 1000 when the VM is down or deleted, 1001 when the daemon stops, 1008 when a client types without "
    "`write`, 1009 for a message over 64 KiB, 1012 when the console was reconnected (connect again), 1013 when the "
    "guest does not read, 4000 when another client took over the input.",
)
TABLE.declare(
    "GET /ws/v1/vms/{name}/tcp/{port}",
    "vm_tcp",
    _USE,
    "Open a TCP connection to a port of the guest's loopback (WebSocket)",
    answers={
        101: Answer("Binary messages with data, in both directions; an empty one ends its direction"),
    },
    errors=(409, 426, 502),
    credentials_in_query=True,
    details="Messages of a client have at most 64 KiB. Close codes: 1000 when both directions have ended, 1001 when "
    "the daemon stops, 1002 for data after the end, 1003 for text, 1009 for a message over 64 KiB, 1011 when the "
    "connection breaks.",
)


def _relayed(resource: str, path: str, summary: str) -> None:
    answers: Mapping[int | Literal["default"], Answer] = {"default": Answer("The guest's answer", bytes, ANY)}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        TABLE.declare(
            f"{method} {path}",
            f"{method.lower()}_{resource}",
            _USE,
            summary,
            answers=answers,
            body=bytes if method in ("POST", "PUT", "PATCH") else None,
            errors=(409, 502),
            each_minute=True,
            details="WebSockets work too. The last part of the path may contain slashes, and may be empty.",
        )


_relayed("agent", f"{_VM}/agent/{{path}}", "Call a route of the agent or, if it has none, of the workload")
_relayed("port", f"{_VM}/ports/{{port}}/{{path}}", "Send an HTTP request to a port of the guest's loopback")

_CDP = Answer("Messages of the Chrome DevTools Protocol, byte for byte")
_DONE = Answer("The browser's confirmation", str, "text/plain")


def _devtools(route: str, name: str, summary: str, answer: Answer, *errors: int) -> None:
    method, path = route.split(" ")
    TABLE.declare(
        f"{method} /ws/v1/vms/{{name}}/devtools/{path}",
        f"devtools_{name}",
        _USE,
        summary,
        answers={200 if answer.type is not None else 101: answer},
        errors=(409, 502, 503, *errors),
        credentials_in_query=True,
        each_minute=name in ("version", "list", "json", "protocol"),
    )


_devtools(
    "GET json/version",
    "version",
    "Show the version and control URL of the browser in a VM",
    Answer("Its `webSocketDebuggerUrl` leads through this daemon", JsonObject),
)
_devtools(
    "GET json/list",
    "list",
    "List the pages of the browser",
    Answer("The pages, each with its `webSocketDebuggerUrl` and `devtoolsFrontendUrl`", list[JsonObject]),
)
_devtools("GET json", "json", "List the pages of the browser, as `json/list`", Answer("The pages", list[JsonObject]))
_devtools(
    "PUT json/new", "new", "Open a page; the query is its address, percent-encoded", Answer("The page", JsonObject)
)
_devtools(
    "GET json/protocol",
    "protocol",
    "Show the protocol that the browser speaks",
    Answer("The browser's domains, commands and types", JsonObject),
)
_devtools("GET json/activate/{target}", "activate", "Bring a page to the front", _DONE)
_devtools("GET json/close/{target}", "close", "Close a page", _DONE)
_devtools("GET browser", "websocket", "Control the browser (WebSocket)", _CDP, 426)
_devtools("GET browser/{target}", "browser_websocket", "Control the browser by its id (WebSocket)", _CDP, 426)
_devtools("GET page/{target}", "page_websocket", "Control a page (WebSocket)", _CDP, 426)


@TABLE.operation(
    f"POST {_VM}/origins",
    permission=Permission.USE,
    answer="The address, and a link that opens it",
    errors=(409, 503),
    secret=True,
    examples={"A server": {"port": 8080}},
)
async def open_port(context: Context, name: str, *, body: OpenPort) -> PortOriginView:
    """Open a port of a VM at an origin of its own, where the scripts and cookies of its pages work.

    On loopback the origin is `{port}-{id}.localhost`. Otherwise it is below a name with `*.` in the daemon's
    `allowed_hosts`; 409 if there is none, or if the VM is on another host of the fleet. If keys are required, the link
    carries a grant that is valid as long as the credentials of this request, at most 12 hours.
    """
    row = find_vm(context.deps, context.named(name))
    access, fleet = context.deps.access, context.deps.fleet
    if fleet is not None and context.scope["state"].get("forwarded") is not None:
        # The link would lead to the host that the client has asked, whose origins are those of its own VMs.
        raise Problem(
            409, "port-elsewhere", f"VM {name!r} is on the host {fleet.host!r}, which alone has origins for its ports",
            hint=f"open it from the console of {fleet.host}, or use `volar vms forward`, which works at any host",
            vm=name,
        )  # fmt: skip
    origin = access.port_address(context.scope, row.id, body.port)
    if origin is None:
        raise Problem(
            409, "no-port-domain", "this daemon has no name below which ports can have origins of their own",
            hint="add one to allowed_hosts, such as *.volant.example.com, with its DNS entry and its certificate; or "
            "use `volar vms forward`", vm=name,
        )  # fmt: skip
    ticket = access.port_ticket(context.caller, row.id, body.port)
    opened = f"/.volant/open?{urlencode({'ticket': ticket, 'to': body.path})}" if ticket is not None else body.path
    return PortOriginView(origin, origin + opened)


TABLE.declare(
    f"POST {_VM}/actions/{{plugin}}/{{action}}",
    "call_action",
    _USE,
    "Call an action of the plugin's manifest",
    answers={"default": Answer("The workload's answer", bytes, ANY)},
    body=bytes,
    errors=(409, 502),
    details="Body, content type and query are passed to the workload, with the method and the path in the manifest.",
)
TABLE.declare(
    f"GET {_VM}/openapi",
    "workload_openapi",
    _USE,
    "Get the workload's own OpenAPI document",
    answers={200: Answer("The document, with server URLs that lead through the daemon", JsonObject)},
    errors=(502,),
    details="A running workload is asked first, at the manifest's path or at `/openapi.json`. If it has no valid "
    "document, the manifest's own document is returned.",
    each_minute=True,
)
