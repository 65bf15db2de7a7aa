"""VMs: create, watch, change, delete; and copies of running ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any

from volant.journal import VmChanged, VmCreated, VmForked
from volant.model import (
    Command,
    CommandRequest,
    CreateVm,
    ForkVm,
    RestoreVm,
    Status,
    VmMemory,
    VmView,
    check_create,
    check_fork,
    check_restore,
    view,
)
from volant.model.agent import MAX_GRACE_S

from ._context import Context
from ._lookup import find_vm, select_vms
from ._parameters import Integer, LabelPairs, Names, Seconds, Words
from ._permission import Permission
from ._results import Page
from ._table import TABLE, Anything, F, Tool

_VM = "/api/v1/vms/{name}"
_DEFAULT_GRACE_S = 10.0

Grace = Annotated[
    float,
    Seconds(
        name="grace",
        help="How long the guest has before it is killed: default `10s`, at most `10m`",
        maximum=MAX_GRACE_S,
    ),
]


@TABLE.operation(
    "GET /api/v1/vms",
    permission=Permission.VIEW,
    answer="All that fit, unless there is a `limit`",
    headers=("Volant-Event-Id", "Link"),
    tool=Tool(
        "vms_list",
        "List VMs",
        "List the microVMs on this host with their state, size, plugin and labels, oldest first. Use it to find a VM's "
        "name, or to see what runs; for one VM whose name you know use vms_get.",
    ),
)
async def list_vms(
    context: Context,
    *,
    status: Annotated[Collection[str], Words(help="In one of these states", of=Status)] = (),
    plugin: Annotated[Collection[str], Names(help="Of one of these plugins")] = (),
    labels: Annotated[Mapping[str, str], LabelPairs(name="label", help="`key=value`; all of them must hold")] = {},
    limit: Annotated[int | None, Integer(help="At most so many", minimum=1, maximum=1000, tool_maximum=200)] = None,
    cursor: Annotated[int, Integer(help="As in the `Link` before; opaque")] = 0,
) -> Page[VmView]:
    """List VMs, by id."""
    rows = select_vms(context.deps, states=status, plugins=plugin, labels=labels)
    left = [row for row in rows if row.id > cursor]
    page = left if limit is None else left[:limit]
    return Page(
        [view(row) for row in page],
        len(rows),
        page[-1].id if len(page) < len(left) else None,
        str(context.deps.store.projection.last_event),
    )


@TABLE.operation(
    "POST /api/v1/vms",
    permission=Permission.CONTROL,
    status=201,
    answer="The VM, usually `pending`",
    errors=(404, 503),
    idempotent=True,
    waits_for=Status.RUNNING,
    tool=(
        Tool(
            "vms_create",
            "Create a VM",
            "Make a new Linux microVM and boot it. Answers once it runs and vms_exec works in it, usually in some "
            "seconds. `name` must be new: lower-case letters, digits and dashes. 1 CPU core and 256 MiB do for most; "
            "plugins (plugins_list) bring other software, and may need more. Without a root filesystem its files are "
            "in memory, and are lost when it stops. Give `ttl` (such as `30m`) to a VM that you need only for a while.",
            body=CreateVm,
        ),
        Tool(
            "vms_restore",
            "Make a VM from a snapshot",
            "Make a new VM that continues from a snapshot (snapshots_list). The VM that the snapshot is of is not "
            "touched; `name` must be new.",
            body=RestoreVm,
        ),
    ),
)
async def create_vm(context: Context, *, body: RestoreVm | CreateVm) -> VmCreated:
    """Create a VM; it is durable when this is answered.

    With `from_snapshot` its first boot continues from that snapshot, as a copy with an identity of its own. Every later
    boot is an ordinary one, with the disk as it was left. If the first fails the VM is `crashed`; no cold boot follows.
    """
    if isinstance(body, RestoreVm):
        check_restore(body)
        return VmCreated.of(await context.deps.vms.copies.restore(body, key=context.key))
    check_create(body)
    return VmCreated.of(await context.deps.vms.create(body, key=context.key))


@TABLE.operation(
    f"GET {_VM}",
    permission=Permission.VIEW,
    answer="The VM as it now is",
    waits_for=Status.RUNNING,
    tool=Tool(
        "vms_get",
        "Look at a VM",
        "One VM as it is now: its `status` (pending, starting, running, paused, stopping, stopped, crashed, deleting), "
        "its size, and in `reason` why it failed, with the last lines of its console.",
    ),
)
async def get_vm(context: Context, name: str) -> VmChanged:
    """Get a VM."""
    return VmChanged.of(find_vm(context.deps, name))


@TABLE.operation(
    f"DELETE {_VM}",
    permission=Permission.CONTROL,
    answer="Nothing of it is left on the host",
    errors=(503,),
    if_match=True,
    tool=Tool(
        "vms_delete",
        "Delete a VM",
        "Destroy a VM with its disk, for good. To get it back later, use vms_stop instead.",
        destructive=True,
        idempotent=True,
    ),
    client_timeout_s=75,
)
async def delete_vm(context: Context, name: str) -> None:
    """Delete a VM.

    A second request joins the first. A client that leaves cancels nothing; past 60 s it is 503.
    """
    name = find_vm(context.deps, name).name
    await context.unless_stopping(
        partial(context.deps.vms.delete, name, only_at=context.versions),
        f"the daemon stops; VM {name!r} is deleted once it is back",
    )


def _command_at(word: str, to: Status, tool: str | None = None, **more: Any) -> Callable[[F], F]:
    """Declares a command that brings a VM to a status.

    :param tool: what models read of it; None: they don't have it
    :param more: as of `Tool`
    """
    return TABLE.operation(
        f"POST {_VM}/{word}",
        permission=Permission.CONTROL,
        answer="The VM",
        errors=(409, 503),
        idempotent=True,
        if_match=True,
        waits_for=to,
        tool=False if tool is None else Tool(f"vms_{word}", f"{word.capitalize()} a VM", tool, **more),
    )


async def _command(context: Context, name: str, command: Command, grace_s: float = _DEFAULT_GRACE_S) -> VmChanged:
    row = find_vm(context.deps, name)
    request = CommandRequest(command, grace_s=grace_s)
    return VmChanged.of(await context.deps.vms.apply(row.name, request, only_at=context.versions, key=context.key))


@_command_at(
    "start",
    Status.RUNNING,
    "Boot a VM that is stopped or crashed, or resume a paused one. Does nothing to one that runs.",
    idempotent=True,
)
async def start_vm(context: Context, name: str) -> VmChanged:
    """Start a VM; nothing happens to one that runs."""
    return await _command(context, name, Command.START)


@_command_at(
    "stop",
    Status.STOPPED,
    "Shut a VM down and keep it for vms_start. What it has in memory is lost, and with it its files unless it has "
    'a disk (`"disk": "overlay"`). Does nothing to one that is stopped.',
    destructive=True,
    idempotent=True,
)
async def stop_vm(context: Context, name: str, *, grace_s: Grace = _DEFAULT_GRACE_S) -> VmChanged:
    """Ask the guest to shut down, then kill it; nothing happens to a VM that is stopped."""
    return await _command(context, name, Command.STOP, grace_s)


@_command_at(
    "restart",
    Status.RUNNING,
    "Shut a VM down and boot it again; what is lost is what vms_stop loses. For a VM that hangs, give `grace_s` 0.",
    destructive=True,
)
async def restart_vm(context: Context, name: str, *, grace_s: Grace = _DEFAULT_GRACE_S) -> VmChanged:
    """Stop a VM and start it again."""
    return await _command(context, name, Command.RESTART, grace_s)


@_command_at(
    "pause",
    Status.PAUSED,
    "Pause a VM, to resume it later at the same instant: programs, memory, connections stay, and it takes no "
    "processor time. While it is paused nothing works in it, vms_exec neither. Its memory stays taken; to free "
    "that, use vms_stop.",
    idempotent=True,
)
async def pause_vm(context: Context, name: str) -> VmChanged:
    """Pause a VM once it runs. Its memory, its process and open streams stay."""
    return await _command(context, name, Command.PAUSE)


@_command_at(
    "resume",
    Status.RUNNING,
    "Resume a paused VM; its clock is set. Does nothing to one that runs.",
    idempotent=True,
)
async def resume_vm(context: Context, name: str) -> VmChanged:
    """Resume a paused VM and set its clock."""
    return await _command(context, name, Command.RESUME)


@_command_at("recover", Status.RUNNING)
async def recover_vm(context: Context, name: str) -> VmChanged:
    """Take control again of a VM whose reason is `control_lost`."""
    return await _command(context, name, Command.RECOVER)


@TABLE.operation(
    f"POST {_VM}/fork",
    permission=Permission.CONTROL,
    status=201,
    answer="The new VMs, usually `pending`; durable",
    errors=(409, 503),
    idempotent=True,
    waits_for=Status.RUNNING,
    tool=Tool(
        "vms_fork",
        "Copy a running VM",
        "Make new VMs that continue from where a running or paused VM is now: programs, memory and disk are the same, "
        "name and ids their own; the VM itself keeps running. Use it to try several things from one point.",
    ),
    client_timeout_s=600,
)
async def fork_vm(context: Context, name: str, *, body: ForkVm) -> VmForked:
    """Create VMs that continue from where this one is; it keeps running itself.

    Each has the memory and disk of this one, and receives its own identity before it is `running`. The VM has to be
    running or paused. With `wait`, `Volant-Wait` is `met` when it is for all.
    """
    check_fork(body)
    return VmForked.of(await context.deps.vms.copies.fork(find_vm(context.deps, name).name, body, key=context.key))


@TABLE.operation(f"GET {_VM}/inspect", permission=Permission.VIEW, answer="What is known")
async def inspect_vm(context: Context, name: str) -> Anything:
    """Show what the daemon does with a VM, to find a fault; its shape is no contract."""
    return context.deps.vms.streams.inspect(find_vm(context.deps, name).name)


@TABLE.operation(
    f"GET {_VM}/memory",
    permission=Permission.VIEW,
    answer="Measured now",
    errors=(409, 503),
    tool=Tool(
        "vms_memory",
        "Measure the memory of a VM",
        "How much memory a VM takes now, in MiB: `guest` as its own kernel sees it (null when it does not answer), "
        "`host` what its hypervisor takes of this host. Use it when a VM seems short of memory, or to find which one "
        "takes most.",
    ),
)
async def vm_memory(context: Context, name: str) -> VmMemory:
    """Measure the memory of a VM, as its guest and as the host sees it.

    Costs the kernel some milliseconds for each GiB, so it is not for every second. 409: there is no process.
    """
    return await context.deps.vms.streams.memory(find_vm(context.deps, name).name)
