"""Finds the objects of a request: VMs, their logs and their actions; and waits for VMs to reach a state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import trio

from volant.channel import AgentClient
from volant.http import interruptible
from volant.journal import VmChanged, VmCreated, VmForked
from volant.logs import VmLog
from volant.model import Action, Key, Problem, VmRow, current_cause, no_such_project

from ._context import Context
from ._deps import ApiDeps

Waited = Literal["met", "failed", "timeout"]
"""`met`: all VMs are or, since the call began, were in one of the states. `failed`: one is at rest in another state, or
deleted."""


async def wait_for(context: Context, result: Any, states: Collection[str], timeout_s: float) -> tuple[Any, Waited]:
    """Waits for the VMs of a result. Returns their new state and how the wait ended.

    When the daemon stops, the wait ends as with a timeout, and the client can repeat it after the restart.

    :raises Problem: 401, the caller's credentials ended
    """
    vms, store = context.deps.vms, context.deps.store
    ids = [vm.id for vm in result.copies] if isinstance(result, VmForked) else [result.vm.id]
    outcomes: list[Waited] = []

    async def wait(vm_id: int) -> None:
        outcomes.append((await vms.wait(vm_id, states, timeout_s, since=context.since))[0])

    async def wait_for_all() -> None:
        async with trio.open_nursery() as nursery:
            for vm_id in ids:
                nursery.start_soon(wait, vm_id)

    async with interruptible(context.stopping) as waits:
        await waits.until(wait_for_all)
    if context.stopping.reason is not None:
        raise context.stopping.problem()
    rows = [row for row in map(store.projection.by_id, ids) if row is not None]
    if isinstance(result, VmForked):
        result = VmForked.of(rows)
    elif rows:
        assert isinstance(result, (VmCreated, VmChanged))
        result = result.of(rows[0])
    if "failed" in outcomes:
        return result, "failed"
    return result, "timeout" if "timeout" in outcomes or len(outcomes) < len(ids) else "met"


_SHOWN = 20


def find_vm(deps: ApiDeps, vm: Key) -> VmRow:
    """Returns the row of a VM. :raises Problem: 404."""
    return deps.store.projection.require(vm)


async def enter(deps: ApiDeps, vm: Key, detail: str = "") -> tuple[VmRow, AgentClient]:
    """Returns a VM and a client of its agent, and records the access.

    :param detail: the part of the guest, for the record
    :raises Problem: 404; 409, it does not run; 503, the access can't be recorded.
    """
    row = find_vm(deps, vm)
    client = deps.vms.guests.agent(vm)
    await record_access(deps, row, detail)
    return row, client


async def record_access(deps: ApiDeps, row: VmRow, detail: str = "") -> None:
    """Records that the caller is about to access a guest. :raises Problem: 503, it can't be recorded."""
    if current_cause.get() is None:
        raise RuntimeError(f"access to VM {row.name} has no cause to record")
    await deps.recorder.begin(row.id, detail)


def require_project(deps: ApiDeps, name: str) -> None:
    """Checks that a project exists. :raises Problem: 404."""
    if deps.store.projection.project(name) is None:
        raise no_such_project(name)


def select_vms(
    deps: ApiDeps,
    project: str | None,
    *,
    states: Collection[str] = (),
    plugins: Collection[str] = (),
    labels: Mapping[str, str] | None = None,
) -> list[VmRow]:
    """Returns the VMs of a project (None for all projects) with one of these states, one of these plugins, and all of
    these labels, by id."""
    wanted = (labels or {}).items()
    return [
        row
        for row in deps.store.projection.rows()
        if project in (None, row.project)
        and (not states or row.status in states)
        and (not plugins or row.plugin in plugins)
        and (not wanted or wanted <= row.labels.items())
    ]


def open_log(deps: ApiDeps, row: VmRow) -> VmLog:
    """Returns the log of a VM. :raises Problem: 503, the disk can't be read."""
    with unreadable(row.name):
        return deps.logs.open(row.id, row.key)


@contextmanager
def unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise Problem(503, "log-unreadable", f"the log of VM {name!r} can't be read: {error}", vm=name) from error


def find_action(row: VmRow, plugin: str, wanted: str) -> tuple[Action, int]:
    """Returns an action of a VM, and the workload's port.

    :raises Problem: 404, the VM has another plugin, or the plugin has no such action.
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
