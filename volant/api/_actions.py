"""`POST /api/v1/vms/{name}/actions/{plugin}/{action}`: what a VM's plugin says that its workload does when asked.

An action is a name for a request to the workload's port, so this is the relay with a method and a path of the
manifest's. The manifest is the VM's own, as it was when the VM was made: a plugin that was removed and installed anew
changes nothing for VMs that are there.

Unlike other streams through the relay an action has a deadline, which the manifest sets: it is a call, and somebody
waits for its end. All of it counts, the client's part too, as nobody can tell what a workload waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import trio

from volant.model import Action, Problem, VmRow, is_name, no_such_vm

from ._doors import Doors
from ._edge import Call, StreamRoute, without_credentials
from ._relay import Relay, to_port

_ACTIONS = re.compile(r"/api/v1/vms/([^/]*)/actions/([^/]*)/([^/]*)\Z")
_SHOWN = 20


def routes(doors: Doors, relay: Relay) -> list[StreamRoute]:
    """The routes of this resource."""

    async def act(call: Call) -> None:
        name, plugin, wanted = call.args
        row = doors.store.projection.get(name) if is_name(name) else None
        if row is None:
            raise no_such_vm(name[:80])
        action, port = action_of(row, plugin, wanted)
        query = without_credentials(call.scope["query_string"]).decode("ascii")
        target = f"{action.path}?{query}" if query else action.path
        with trio.move_on_after(action.timeout_s) as deadline:
            async with to_port(doors.vms.agent(name), name, port) as inner:
                await relay.run(
                    call,
                    inner,
                    vm_id=row.id,
                    vm=name,
                    target=target,
                    host=b"localhost:%d" % port,
                    method=action.method,
                )
        if deadline.cancelled_caught:
            text = f"action {wanted!r} of VM {name!r} took longer than the {action.timeout_s:g} s that it has"
            if call.started:
                raise trio.BrokenResourceError(text)
            raise Problem(502, "action-timeout", text, vm=name)

    return [StreamRoute(_ACTIONS, act, methods=frozenset({"POST"}))]


def action_of(row: VmRow, plugin: str, wanted: str) -> tuple[Action, int]:
    """An action of a VM, and the port at which the workload does it.

    :raises Problem: 404 it is another plugin's VM, or the plugin has no such action.
    """
    if plugin != row.plugin:
        raise Problem(
            404, "not-its-plugin", f"VM {row.name!r} is of plugin {row.plugin!r}, not {plugin[:80]!r}", vm=row.name,
            field="plugin", hint=f"its actions are below /api/v1/vms/{row.name}/actions/{row.plugin}/",
        )  # fmt: skip
    manifest = row.manifest
    action = manifest.actions.get(wanted)
    port = manifest.workload.port if manifest.workload is not None else None
    if action is None or port is None:
        raise Problem(
            404, "action-not-found", f"plugin {plugin!r} of VM {row.name!r} has no action {wanted[:80]!r}",
            vm=row.name, field="action", hint=_listed(manifest.actions),
        )  # fmt: skip
    return action, port


def _listed(names: Iterable[str]) -> str:
    there = sorted(names)
    if not there:
        return "it has none"
    more = f", and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
    return f"there are {', '.join(there[:_SHOWN])}{more}"
