"""`POST /api/v1/vms/{name}/actions/{plugin}/{action}`: calls an action of a VM's workload.

An action is a name for a request to the workload's port, so this is the relay with the manifest's method and path. The
manifest is the VM's own, from when the VM was created: a plugin that was removed and installed again changes nothing
for existing VMs.

Unlike other streams through the relay an action has a deadline, which the manifest sets: it is a call, and its caller
waits for the end. It covers the whole exchange, with the client's body, as it is not visible what a workload waits for.
"""

from __future__ import annotations

import re

import trio

from volant.http import Call, StreamRoute, without_credentials
from volant.model import Problem
from volant.operations import ApiDeps, enter, find_action, find_vm
from volant.relay import GuestServer, Relay, to_port

_ACTIONS = re.compile(r"/api/v1/vms/([^/]*)/actions/([^/]*)/([^/]*)\Z")
_SHOWN = 20


def routes(deps: ApiDeps, relay: Relay) -> list[StreamRoute]:
    """The routes of this resource."""

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

    return [StreamRoute(_ACTIONS, act, methods=frozenset({"POST"}), query_is_guests=True)]
