"""Servers in guests at origins of their own: `http://8080-12.localhost:7777/` is port 8080 of the VM with the id 12.

A request there works like one below `/api/v1/vms/{name}/ports/{port}/`, with the same permission, limits and record.
The only difference is that the guest's answer is not sandboxed, as it has an origin of its own
(`volant.relay.OwnOrigin`).
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from volant.http import Call, PortOrigin
from volant.model import DEFAULT_PROJECT, Key, Problem, VmRow
from volant.operations import ApiDeps

_OURS = "/.volant/"
_OPEN = "/.volant/open"
_PATH = re.compile(rb"/(?![/\\])")
_PROJECT = b"volant-project"
_PAGE = b"""<!doctype html><meta charset="utf-8"><title>Volant</title>
<p>This port of a VM opens for those who may use it: open it from the web console, under Ports of its VM.</p>"""
_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-length", b"%d" % len(_PAGE)),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'"),
]


class PortOrigins:
    """Routes requests at the origins of ports to the VMs."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps

    async def enter(self, call: Call, origin: PortOrigin) -> bool:
        """Implements `volant.http.Ports`."""
        if not origin.vm.isdecimal():
            await self._lead_on(call, origin)
            return False
        vm_id = int(origin.vm)
        path = call.scope["raw_path"].decode("ascii")
        if path.startswith(_OURS):
            await self._open(call, path, vm_id, origin.port)
            return False
        try:
            caller = self._deps.access.authenticate_at_port(call.scope, vm_id, origin.port)
        except Problem:
            if call.method in ("GET", "HEAD") and call.header(b"sec-fetch-dest") == "document":
                await call.reject(401, _PAGE_HEADERS, b"" if call.method == "HEAD" else _PAGE)
                return False
            raise
        row = self._deps.store.projection.by_id(vm_id)
        if row is None or str(vm_id) != origin.vm or caller.project not in (None, row.project):
            raise Problem(
                404, "vm-not-found", f"this host has no VM with the id {vm_id}",
                hint="it may have been deleted; in a fleet, open the port at the host that has its VM",
            )  # fmt: skip
        call.caller = caller
        _below_api(call, row, origin.port)
        return True

    async def _open(self, call: Call, path: str, vm_id: int, port: int) -> None:
        """Redeems a ticket for a grant, and redirects to the link's destination."""
        if path != _OPEN or call.is_websocket or call.method != "GET":
            raise Problem(404, "not-found", "the paths below /.volant/ are the daemon's own")
        query = parse_qs(call.scope["query_string"].decode("ascii", "replace"))
        cookie = self._deps.access.grant(call.scope, query.get("ticket", [""])[0], vm_id, port)
        # The browser leaves this address behind, with the ticket in it.
        await call.reject(
            303,
            [
                (b"location", _local(query.get("to", ["/"])[0])),
                (b"set-cookie", cookie),
                (b"cache-control", b"no-store"),
                (b"referrer-policy", b"no-referrer"),
                (b"content-length", b"0"),
            ],
            b"",
        )

    async def _lead_on(self, call: Call, origin: PortOrigin) -> None:
        """Redirects from the name of a VM to its id. If keys are required, only a grant allows it, and no name is
        revealed."""
        access = self._deps.access
        if access.asks_for_key and not call.scope["state"].get("unix"):
            raise Problem(
                401, "unauthenticated", "this port of a VM needs a grant",
                hint="open it from the web console, under Ports of its VM",
            )  # fmt: skip
        row = self._deps.store.projection.require(Key(DEFAULT_PROJECT, origin.vm))
        secure, _ = access.own_address(call.scope)
        target = call.scope["raw_path"] + (b"?" + call.scope["query_string"] if call.scope["query_string"] else b"")
        place = f"{'https' if secure else 'http'}://{origin.port}-{row.id}.{origin.domain}".encode() + target
        headers = [(b"location", place), (b"cache-control", b"no-store"), (b"content-length", b"0")]
        await call.reject(307, headers, b"")


def _local(to: str) -> bytes:
    """Returns a path on this origin, never an address of another one."""
    # Browsers drop some of these characters, which must not make two slashes of one.
    text = to.encode("ascii", "ignore").translate(None, bytes(range(0x21)) + b"\x7f")
    return text if _PATH.match(text) else b"/"


def _below_api(call: Call, row: VmRow, port: int) -> None:
    """Rewrites a request to the daemon's path of a port. The guest's page does not choose a project."""
    scope = call.scope
    prefix = f"/api/v1/vms/{row.name}/ports/{port}"
    scope["raw_path"] = prefix.encode("ascii") + scope["raw_path"]
    scope["path"] = prefix + scope["path"]
    scope["headers"] = [field for field in scope["headers"] if field[0] != _PROJECT]
    scope["headers"].append((_PROJECT, row.project.encode("ascii")))
