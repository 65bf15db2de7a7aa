"""How WebSockets to a VM end that goes on at another host: with a code that says where."""

from __future__ import annotations

from collections.abc import Callable

from volant.model import Desired, Key
from volant.operations import ApiDeps

MOVED = 4307


def moved(deps: ApiDeps, vm_id: int, vm: Key) -> Callable[[], tuple[int, str] | None]:
    """Returns what gives the code and the reason once another host has a VM that this one has now; None: none has it.

    Call it before the WebSocket opens. Later, another VM may have the name, here or on another host.
    """
    fleet, rows = deps.fleet, deps.store.projection
    if fleet is None or rows.by_id(vm_id) is None:
        return lambda: None
    names = fleet.names["vms"]
    before = names.claim(vm)

    def host_now() -> str | None:
        row = rows.by_id(vm_id)
        if row is not None and row.leaving is not None and row.desired is Desired.DELETED:
            # It is certain, and what is known of the claim may be old.
            return row.leaving.to_host
        now = names.claim(vm)
        if before is None or now is None or now.vm != before.vm or now.owner == fleet.host:
            return None
        return now.owner

    def ending() -> tuple[int, str] | None:
        host = host_now()
        return None if host is None else (MOVED, f"the VM is on the host {host} now")

    return ending
