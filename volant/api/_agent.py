"""`/api/v1/vms/{name}/agent/*` and `/api/v1/vms/{name}/ports/{port}/*`: what runs inside a VM."""

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
"""So agents of all versions begin to say that."""
_NO_WEBSOCKET = "not with GET"
"""And so the first of them, of the route for commands."""
_ENCODED_SLASH = re.compile("%2f", re.IGNORECASE)
_PORTS = re.compile(r"/api/v1/vms/([^/]*)/ports/([^/]*)(?:/.*)?\Z")


def routes(deps: ApiDeps, relay: Relay) -> list[StreamRoute]:
    """The routes of this resource."""

    async def agent(call: Call) -> None:
        row, client = _way_in(deps, call.args[0])
        target = _with_slashes(_target(call, depth=6))
        if _is_the_daemons(target):
            raise Problem(404, "not-found", "there is no such route in the agent", vm=row.name)
        explain = partial(_explain, row.name, target) if _may_be_newer(target) else None
        await relay.run(call, client, vm_id=row.id, vm=row.name, target=target, host=b"agent", explain=explain)

    async def ports(call: Call) -> None:
        port = parse_port(call.args[1])
        row, client = _way_in(deps, call.args[0])
        async with to_port(client, row.name, port) as inner:
            host = b"localhost:%d" % port
            await relay.run(call, inner, vm_id=row.id, vm=row.name, target=_target(call, depth=7), host=host)

    return [
        StreamRoute(_AGENT, agent, methods=None, websocket=True),
        StreamRoute(_PORTS, ports, methods=None, websocket=True),
    ]


def _way_in(deps: ApiDeps, name: str) -> tuple[VmRow, AgentClient]:
    return find_vm(deps, name), deps.vms.streams.agent(name)


def _target(call: Call, *, depth: int) -> str:
    """What follows the first `depth` slashes of the path, byte for byte, and the query without our credentials."""
    path = call.scope["raw_path"].decode("ascii")
    rest = path.split("/", depth)[depth] if path.count("/") >= depth else ""
    query = without_credentials(call.scope["query_string"]).decode("ascii")
    return f"/{rest}?{query}" if query else f"/{rest}"


def _with_slashes(target: str) -> str:
    """A path below `files/` with its slashes plain: generated clients encode them in a parameter of a path. The agent
    checks the path that results."""
    if not target.startswith(FILES):
        return target
    path, mark, query = target.partition("?")
    return _ENCODED_SLASH.sub("/", path) + mark + query


def _may_be_newer(target: str) -> bool:
    """Whether an agent of a guest that an older daemon has started may not have that route of ours yet."""
    path = target.partition("?")[0]
    return path in (EXEC, EXEC_SESSIONS) or path.startswith((EXEC_SESSIONS + "/", FILES))


def _explain(vm: str, target: str, status: int, body: bytes) -> Problem | None:
    """502, when an agent does not know its own route, and not what the route leads to."""
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
    """Whether the agent could take `target` for one of the routes that are the daemon's alone, however it is spelt."""
    path = target.partition("?")[0]
    for _ in range(3):
        path = unquote(path)
    path = posixpath.normpath("/" + path.replace("\\", "/").lstrip("/")).lower()
    return f"{path}/".startswith(DAEMON_PREFIX)
