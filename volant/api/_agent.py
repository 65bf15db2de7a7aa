"""Relays to servers inside a VM: `/api/v1/vms/{name}/agent/*`, `ports/{port}/*` and `actions/{plugin}/{action}`.

An action is a name for a request to the workload's port, so it is a relay with the manifest's method and path. The
manifest is the VM's own, from the VM's creation: existing VMs ignore that a plugin is removed and installed again.
Unlike other relays an action has a deadline, which the manifest sets, because its caller waits for the end. It covers
the whole exchange, including the client's body, as the daemon can't see what a workload waits for.
"""

from __future__ import annotations

import posixpath
import re
from functools import partial
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

from volant.http import Call, StreamRoute, without_credentials
from volant.model import Problem, VmRow
from volant.model.agent import DAEMON_PREFIX, EXEC, EXEC_SESSIONS, FILES
from volant.operations import ApiDeps, enter, find_action, find_vm
from volant.relay import GuestServer, OwnOrigin, Relay, parse_port, to_port

from ._session import moved

_AGENT = re.compile(r"/api/v1/vms/([^/]*)/agent(?:/.*)?\Z")
_NO_ROUTE = "the agent has no "
"""The start of the 404 for an unknown route, in agents of all versions."""
_NO_WEBSOCKET = "not with GET"
"""The start of the first agents' 405 for a WebSocket to exec."""
_ENCODED_SLASH = re.compile("%2f", re.IGNORECASE)
_ACTIONS = re.compile(r"/api/v1/vms/([^/]*)/actions/([^/]*)/([^/]*)\Z")
_PORTS = re.compile(r"/api/v1/vms/([^/]*)/ports/([^/]*)(?:/.*)?\Z")


def routes(deps: ApiDeps, relay: Relay) -> list[StreamRoute]:
    """Returns the routes of this resource."""

    async def agent(call: Call) -> None:
        vm = call.named(call.args[0])
        target = _with_slashes(_target(call, depth=6))
        if _is_the_daemons(target):
            raise Problem(404, "not-found", "there is no such route in the agent", vm=find_vm(deps, vm).name)
        row, client = await enter(deps, vm, _file_of(target))
        explain = partial(_explain, row.name, target) if _may_be_newer(target) else None
        server = GuestServer(row.name, b"agent", target, moved(deps, row.id, row.key))
        await relay.run(call, client, server, share=row.id, explain=explain)

    async def ports(call: Call) -> None:
        port = parse_port(call.args[1])
        row, client = await enter(deps, call.named(call.args[0]), f"port {port}")
        async with to_port(client, row.name, port) as inner:
            await relay.run(call, inner, _server(deps, call, row, port), share=row.id)

    async def act(call: Call) -> None:
        name, plugin, wanted = call.args
        vm = call.named(name)
        action, port = find_action(find_vm(deps, vm), plugin, wanted)
        row, client = await enter(deps, vm, f"{plugin}/{wanted}")
        query = without_credentials(call.scope["query_string"]).decode("ascii")
        target = f"{action.path}?{query}" if query else action.path
        with trio.move_on_after(action.timeout_s) as deadline:
            async with to_port(client, name, port) as inner:
                server = GuestServer(name, b"localhost:%d" % port, target)
                await relay.run(call, inner, server, share=row.id, method=action.method)
        if deadline.cancelled_caught:
            text = f"action {wanted!r} of VM {name!r} took longer than the {action.timeout_s:g} s that it has"
            if call.started:
                raise trio.BrokenResourceError(text)
            raise Problem(502, "action-timeout", text, vm=name)

    return [
        StreamRoute(_ACTIONS, act, methods=frozenset({"POST"}), query_is_guests=True),
        StreamRoute(_AGENT, agent, methods=None, websocket=True, query_is_guests=True),
        StreamRoute(_PORTS, ports, methods=None, websocket=True, query_is_guests=True),
    ]


def _server(deps: ApiDeps, call: Call, row: VmRow, port: int) -> GuestServer:
    """Returns the server at a port, at the path of the API or at its own origin."""
    host = b"localhost:%d" % port
    if call.port_origin is None:
        return GuestServer(row.name, host, _target(call, depth=7), moved(deps, row.id, row.key))
    secure, netloc = deps.access.own_address(call.scope)
    origin = f"{'https' if secure else 'http'}://{netloc}".encode("ascii")
    # All of the query is the guest's.
    return OwnOrigin(
        row.name, host, _target(call, depth=7, credentials=True), origin=origin, ended=moved(deps, row.id, row.key)
    )


def _file_of(target: str) -> str:
    """Returns the path of the file in a request, for its record; empty if it has none."""
    path = target.partition("?")[0]
    return "/" + unquote(path.removeprefix(FILES)) if path.startswith(FILES) else ""


def _target(call: Call, *, depth: int, credentials: bool = False) -> str:
    """Returns the rest of the path after the first `depth` slashes, byte for byte, and the query, by default without
    credentials."""
    path = call.scope["raw_path"].decode("ascii")
    rest = path.split("/", depth)[depth] if path.count("/") >= depth else ""
    query = call.scope["query_string"]
    query = (query if credentials else without_credentials(query)).decode("ascii")
    return f"/{rest}?{query}" if query else f"/{rest}"


def _with_slashes(target: str) -> str:
    """Decodes `%2F` in a path below `files/`, as generated clients encode slashes in a path parameter. The agent checks
    the resulting path."""
    if not target.startswith(FILES):
        return target
    path, separator, query = target.partition("?")
    return _ENCODED_SLASH.sub("/", path) + separator + query


def _may_be_newer(target: str) -> bool:
    """Returns whether the agent of a guest that an older daemon started may lack this route."""
    path = target.partition("?")[0]
    return path in (EXEC, EXEC_SESSIONS) or path.startswith((EXEC_SESSIONS + "/", FILES))


def _explain(vm: str, target: str, status: int, body: bytes) -> Problem | None:
    """Returns the 502 if the agent lacks this route; None if the answer means something else, such as a missing
    file."""
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
    """Returns whether `target`, in any spelling, is one of the agent's routes for the daemon only."""
    path = target.partition("?")[0]
    for _ in range(3):
        path = unquote(path)
    path = posixpath.normpath("/" + path.replace("\\", "/").lstrip("/")).lower()
    return f"{path}/".startswith(DAEMON_PREFIX)
