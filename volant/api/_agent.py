"""`/api/v1/vms/{name}/agent/*` and `/api/v1/vms/{name}/ports/{port}/*`: relays to servers inside a VM."""

from __future__ import annotations

import posixpath
import re
from functools import partial
from typing import Any
from urllib.parse import unquote

import msgspec

from volant.channel import AgentClient
from volant.http import Call, StreamRoute, without_credentials
from volant.model import Problem, VmRow
from volant.model.agent import DAEMON_PREFIX, EXEC, EXEC_SESSIONS, FILES
from volant.operations import ApiDeps, find_vm
from volant.relay import Relay, parse_port, to_port

_AGENT = re.compile(r"/api/v1/vms/([^/]*)/agent(?:/.*)?\Z")
_NO_ROUTE = "the agent has no "
"""How agents of all versions begin the 404 for a route that they don't have."""
_NO_WEBSOCKET = "not with GET"
"""How the first agents began the 405 of exec for a WebSocket."""
_ENCODED_SLASH = re.compile("%2f", re.IGNORECASE)
_PORTS = re.compile(r"/api/v1/vms/([^/]*)/ports/([^/]*)(?:/.*)?\Z")


def routes(deps: ApiDeps, relay: Relay) -> list[StreamRoute]:
    """The routes of this resource."""

    async def agent(call: Call) -> None:
        row, client = _connect(deps, call.args[0])
        target = _with_slashes(_target(call, depth=6))
        if _is_the_daemons(target):
            raise Problem(404, "not-found", "there is no such route in the agent", vm=row.name)
        explain = partial(_explain, row.name, target) if _may_be_newer(target) else None
        await relay.run(call, client, vm_id=row.id, vm=row.name, target=target, host=b"agent", explain=explain)

    async def ports(call: Call) -> None:
        port = parse_port(call.args[1])
        row, client = _connect(deps, call.args[0])
        async with to_port(client, row.name, port) as inner:
            host = b"localhost:%d" % port
            await relay.run(call, inner, vm_id=row.id, vm=row.name, target=_target(call, depth=7), host=host)

    return [
        StreamRoute(_AGENT, agent, methods=None, websocket=True),
        StreamRoute(_PORTS, ports, methods=None, websocket=True),
    ]


def _connect(deps: ApiDeps, name: str) -> tuple[VmRow, AgentClient]:
    return find_vm(deps, name), deps.vms.streams.agent(name)


def _target(call: Call, *, depth: int) -> str:
    """Returns what follows the first `depth` slashes of the path, byte for byte, and the query without credentials."""
    path = call.scope["raw_path"].decode("ascii")
    rest = path.split("/", depth)[depth] if path.count("/") >= depth else ""
    query = without_credentials(call.scope["query_string"]).decode("ascii")
    return f"/{rest}?{query}" if query else f"/{rest}"


def _with_slashes(target: str) -> str:
    """Decodes `%2F` in a path below `files/`, as generated clients encode slashes in a path parameter. The agent checks
    the resulting path."""
    if not target.startswith(FILES):
        return target
    path, separator, query = target.partition("?")
    return _ENCODED_SLASH.sub("/", path) + separator + query


def _may_be_newer(target: str) -> bool:
    """Whether the agent of a guest that an older daemon started may lack this route."""
    path = target.partition("?")[0]
    return path in (EXEC, EXEC_SESSIONS) or path.startswith((EXEC_SESSIONS + "/", FILES))


def _explain(vm: str, target: str, status: int, body: bytes) -> Problem | None:
    """Returns 502 if the agent lacks this route; None if the answer means something else, such as a missing file."""
    try:
        detail = str(msgspec.json.decode(body, type=dict[str, Any]).get("detail"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not detail.startswith(_NO_ROUTE if status == 404 else _NO_WEBSOCKET):
        return None
    return Problem(
        502, "agent-too-old", f"the agent in VM {vm!r} is older than this daemon, and can't do that: {detail[:300]}",
        vm=vm, hint=f"`volar vms restart {vm}` boots it with the present one",
    )  # fmt: skip


def _is_the_daemons(target: str) -> bool:
    """Whether `target`, in any spelling, is one of the agent's routes that only the daemon may use."""
    path = target.partition("?")[0]
    for _ in range(3):
        path = unquote(path)
    path = posixpath.normpath("/" + path.replace("\\", "/").lstrip("/")).lower()
    return f"{path}/".startswith(DAEMON_PREFIX)
