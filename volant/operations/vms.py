"""VMs: create, watch, change, delete; and copies of running ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from volant.journal import VmChanged, VmCreated, VmForked
from volant.model import (
    Command,
    CommandRequest,
    CreateVm,
    ForkVm,
    Permission,
    Problem,
    RestoreVm,
    Status,
    VmMemory,
    VmStats,
    VmView,
    check_create,
    check_fork,
    check_restore,
    parse_mounts,
    view,
)
from volant.model.agent import MAX_GRACE_S
from volant.vm import image_manifest, with_exposed_ports

from ._context import Context
from ._images import admit_image, image_problems, registry_auth
from ._lookup import find_vm, select_vms
from ._parameters import Integer, LabelPairs, Names, Seconds, Words
from ._results import Page
from ._spans import PageSpans, Spans
from ._table import TABLE, F, JsonObject, Tool

if TYPE_CHECKING:
    from volant.fleet import Fleet

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


def _last_known(context: Context, fleet: Fleet, host: str, parameters: Mapping[str, Any]) -> Page[VmView]:
    """Returns the VMs of a host that does not answer, as it has reported them."""
    listed, limit = context.listed, parameters["limit"]
    fits = [
        vm
        for vm in sorted(fleet.last_known_of(host), key=lambda vm: vm.id)
        if listed in (None, vm.project)
        and (not parameters["status"] or vm.status in parameters["status"])
        and (not parameters["plugin"] or vm.plugin in parameters["plugin"])
        and parameters["labels"].items() <= vm.labels.items()
    ]
    left = [vm for vm in fits if vm.id > parameters["cursor"]]
    page = left if limit is None else left[:limit]
    return Page(page, len(fits), page[-1].id if len(page) < len(left) else None, "", [vm.id for vm in page])


@TABLE.operation(
    "GET /api/v1/vms",
    permission=Permission.VIEW,
    answer="All that fit, unless there is a `limit`",
    headers=("Volant-Event-Id", "Link"),
    spans=PageSpans(VmView, lambda vm: vm.id, _last_known),
    tool=Tool(
        "vms_list",
        "List VMs",
        "List the microVMs with their state, size, plugin and labels, oldest first. Use it to find a VM's "
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
    rows = select_vms(context.deps, context.listed, states=status, plugins=plugin, labels=labels)
    left = [row for row in rows if row.id > cursor]
    page = left if limit is None else left[:limit]
    return Page(
        [view(row) for row in page],
        len(rows),
        page[-1].id if len(page) < len(left) else None,
        str(context.deps.store.projection.last_event),
        [row.id for row in page],
    )


@TABLE.operation(
    "POST /api/v1/vms",
    permission=Permission.CONTROL,
    status=201,
    answer="The VM, usually `pending`",
    errors=(403, 404, 413, 502, 503, 504, 507),
    idempotent=True,
    waits_for=Status.RUNNING,
    registry_auth=True,
    tool=(
        Tool(
            "vms_create",
            "Create a VM",
            "Make a new Linux microVM and boot it. Answers once it runs and vms_exec works in it, usually in some "
            "seconds. `name` must be new: lower-case letters, digits and dashes. 1 CPU core and 256 MiB do for most; "
            "plugins (plugins_list) bring other software, and may need more; `image` names an OCI image, as "
            "`docker run` does. Without a root filesystem its files are in memory, and are lost when it stops. Give "
            "`ttl` (such as `30m`) to a VM that you need only for a while.",
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
    journaled=True,
    examples={
        "A small Linux": {"name": "web", "memory_mb": 128},
        "An OCI image": {"name": "web", "image": "nginx:1.29", "ports": ["8080:80"]},
        "A snapshot": {"name": "try-1", "from_snapshot": "prepared"},
    },
)
async def create_vm(context: Context, *, body: RestoreVm | CreateVm) -> VmCreated:
    """Create a VM; it is durable when this is answered.

    With `image`, the image's manifest and configuration are fetched before this is answered, and its layers as the VM
    boots; what the image's configuration says of the program, the body may replace.

    With `from_snapshot` its first boot continues from that snapshot, as a copy with an identity of its own. Every later
    boot is an ordinary one, with the disk as it was left. If the first fails the VM is `crashed`; no cold boot follows.
    """
    if isinstance(body, RestoreVm):
        check_restore(body)
        return VmCreated.of(await context.deps.vms.copies.restore(body, context.project, key=context.key))
    check_create(body)
    _check_directories(context, body)
    if body.placement is not None and context.deps.fleet is None:
        raise Problem(
            409, "no-fleet", "this host is in no fleet, so there is no other one for the VM", field="placement",
            hint="leave `placement` out",
        )  # fmt: skip
    manifest = None
    if body.image is not None:
        auth = await registry_auth(context, body.registry_secret)
        await admit_image(context, body.image, "image")
        with image_problems("image"):
            is_admin = context.caller.may(Permission.ADMIN)
            image = await context.deps.oci.resolve(body.image, context.project, auth=auth, is_admin=is_admin)
        manifest = image_manifest(body, image)
        if body.publish_all:
            taken = {port.host_port for row in context.deps.store.projection.rows() for port in row.ports}
            start = int.from_bytes(context.deps.host.random.token_bytes(2))
            body = with_exposed_ports(body, image, taken, start)
    return VmCreated.of(await context.deps.vms.create(body, context.project, manifest=manifest, key=context.key))


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
    return VmChanged.of(find_vm(context.deps, context.named(name)))


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
    journaled=True,
)
async def delete_vm(context: Context, name: str) -> None:
    """Delete a VM.

    A second request joins the first. A client that leaves cancels nothing; past 60 s it is 503.
    """
    vm = context.named(name)
    await context.unless_stopping(
        partial(context.deps.vms.delete, vm, only_at=context.versions),
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
        journaled=True,
        tool=False if tool is None else Tool(f"vms_{word}", f"{word.capitalize()} a VM", tool, **more),
    )


async def _command(context: Context, name: str, command: Command, grace_s: float = _DEFAULT_GRACE_S) -> VmChanged:
    row = find_vm(context.deps, context.named(name))
    request = CommandRequest(command, grace_s=grace_s)
    return VmChanged.of(await context.deps.vms.apply(row.key, request, only_at=context.versions, key=context.key))


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
    journaled=True,
    examples={"Three copies": {"count": 3}, "Copies by name": {"names": ["try-1", "try-2"]}},
)
async def fork_vm(context: Context, name: str, *, body: ForkVm) -> VmForked:
    """Create VMs that continue from where this one is; it keeps running itself.

    Each has the memory and disk of this one, and receives its own identity before it is `running`. The VM has to be
    running or paused. With `wait`, `Volant-Wait` is `met` when it is for all.
    """
    check_fork(body)
    return VmForked.of(await context.deps.vms.copies.fork(context.named(name), body, key=context.key))


@TABLE.operation(f"GET {_VM}/inspect", permission=Permission.VIEW, answer="What is known")
async def inspect_vm(context: Context, name: str) -> JsonObject:
    """Show what the daemon does with a VM, to find a fault; its shape is no contract."""
    key = context.named(name)
    found = context.deps.vms.guests.inspect(key)
    return {**found, "egress": await context.deps.egress.describe(find_vm(context.deps, key))}


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
    return await context.deps.vms.guests.memory(context.named(name))


@TABLE.operation(
    # Not below `/vms`, where a VM may have any name.
    "GET /api/v1/stats/vms",
    permission=Permission.VIEW,
    answer="Measured now; VMs without a process are left out",
    spans=Spans(VmStats, lambda vm: vm.name),
    client="vms.stats",
)
async def vm_stats(context: Context) -> list[VmStats]:
    """Measure what each VM uses of the host: processor, memory, disks, network.

    The figures count from the start of the VM's process: two measurements give the use between them.
    """
    return await context.deps.vms.guests.stats(select_vms(context.deps, context.listed))


def _check_directories(context: Context, request: CreateVm) -> None:
    """:raises Problem: 403 the VM would have a directory of the host, which belongs to no project."""
    directories = parse_mounts(request.volumes).directories
    if directories and not context.caller.may(Permission.ADMIN):
        raise Problem(
            403,
            "host-directory-denied",
            f"only an administrator may give a VM the host's directory {directories[0].source}",
            field="volumes",
            hint="use a volume: `volar volumes create NAME`",
        )
