"""VMs: create, watch, change and delete them, and copy running ones."""

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
        help="How long the guest may take to shut down before it is killed: default `10s`, at most `10m`",
        maximum=MAX_GRACE_S,
    ),
]


def _last_known(context: Context, fleet: Fleet, host: str, parameters: Mapping[str, Any]) -> Page[VmView]:
    """Returns the VMs of an unreachable host, from its last report."""
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
    answer="The matching VMs, oldest first",
    headers=("Volant-Event-Id", "Link"),
    spans=PageSpans(VmView, lambda vm: vm.id, _last_known),
    tool=Tool(
        "vms_list",
        "List VMs",
        "List the microVMs with their state, size, plugin and labels, oldest first. Use it to find a VM's "
        "name, or to see which VMs run; for one VM whose name you know use vms_get.",
    ),
)
async def list_vms(
    context: Context,
    *,
    status: Annotated[Collection[str], Words(help="Only VMs in one of these states", of=Status)] = (),
    plugin: Annotated[Collection[str], Names(help="Only VMs of one of these plugins")] = (),
    labels: Annotated[
        Mapping[str, str], LabelPairs(name="label", help="Only VMs with all of these labels, as `key=value`")
    ] = {},
    limit: Annotated[
        int | None, Integer(help="Maximum number of results", minimum=1, maximum=1000, tool_maximum=200)
    ] = None,
    cursor: Annotated[int, Integer(help="Opaque cursor from the previous `Link` header")] = 0,
) -> Page[VmView]:
    """List VMs, by id."""
    rows = select_vms(context.deps, context.listed, states=status, plugins=plugin, labels=labels)
    left = [row for row in rows if row.id > cursor]
    page = left if limit is None else left[:limit]
    return Page(
        [row.view for row in page],
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
            "Make a new VM that continues from a snapshot (snapshots_list). The snapshot's VM is not changed; "
            "`name` must be new.",
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
    """Create a VM; it is durable when the request returns.

    With `image`, the image's manifest and configuration are fetched before the request returns, and its layers while
    the VM boots. The body can override the image's configuration of the program.

    With `from_snapshot`, the first boot continues from that snapshot, as a copy with its own identity. Every later boot
    is an ordinary one with the VM's disk. If the first boot fails, the VM is `crashed`; it does not boot cold.
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
    answer="The VM",
    waits_for=Status.RUNNING,
    tool=Tool(
        "vms_get",
        "Get a VM",
        "The present state of a VM: its `status` (pending, starting, running, paused, stopping, stopped, crashed, "
        "deleting), its size, and in `reason` why it failed, with the last lines of its console.",
    ),
)
async def get_vm(context: Context, name: str) -> VmChanged:
    """Get a VM."""
    return VmChanged.of(find_vm(context.deps, context.named(name)))


@TABLE.operation(
    f"DELETE {_VM}",
    permission=Permission.CONTROL,
    answer="The VM is completely removed from the host",
    errors=(503,),
    if_match=True,
    tool=Tool(
        "vms_delete",
        "Delete a VM",
        "Delete a VM with its disk, permanently. To get it back later, use vms_stop instead.",
        destructive=True,
        idempotent=True,
    ),
    client_timeout_s=75,
    journaled=True,
)
async def delete_vm(context: Context, name: str) -> None:
    """Delete a VM with its disk.

    A second request joins the first. The deletion continues if the client disconnects; after 60 s the answer is 503.
    """
    vm = context.named(name)
    await context.unless_stopping(
        partial(context.deps.vms.delete, vm, only_at=context.versions),
        f"the daemon stops; VM {name!r} is deleted once it is back",
    )


def _command_at(word: str, to: Status, tool: str | None = None, **more: Any) -> Callable[[F], F]:
    """Declares a command that changes a VM's status.

    :param tool: the description for models; None for no tool
    :param more: members of `Tool`
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
    "Boot a stopped or crashed VM, or resume a paused one. Does nothing if it runs.",
    idempotent=True,
)
async def start_vm(context: Context, name: str) -> VmChanged:
    """Start a VM; does nothing if it runs."""
    return await _command(context, name, Command.START)


@_command_at(
    "stop",
    Status.STOPPED,
    "Shut a VM down and keep it for vms_start. Its memory is lost, and so are its files unless it has a disk "
    '(`"disk": "overlay"`). Does nothing if it is stopped.',
    destructive=True,
    idempotent=True,
)
async def stop_vm(context: Context, name: str, *, grace_s: Grace = _DEFAULT_GRACE_S) -> VmChanged:
    """Ask the guest to shut down, then kill it; does nothing if the VM is stopped."""
    return await _command(context, name, Command.STOP, grace_s)


@_command_at(
    "restart",
    Status.RUNNING,
    "Shut a VM down and boot it again; it loses the same data as with vms_stop. For a VM that hangs, use `grace_s` 0.",
    destructive=True,
)
async def restart_vm(context: Context, name: str, *, grace_s: Grace = _DEFAULT_GRACE_S) -> VmChanged:
    """Stop a VM and start it again."""
    return await _command(context, name, Command.RESTART, grace_s)


@_command_at(
    "pause",
    Status.PAUSED,
    "Pause a VM, to resume it later from the same state: it keeps programs, memory and connections, and uses no "
    "processor time. While it is paused, nothing works in it, including vms_exec. Its memory stays allocated; to "
    "free it, use vms_stop.",
    idempotent=True,
)
async def pause_vm(context: Context, name: str) -> VmChanged:
    """Pause a VM once it runs. Its memory, its process and open streams stay."""
    return await _command(context, name, Command.PAUSE)


@_command_at(
    "resume",
    Status.RUNNING,
    "Resume a paused VM and set its clock. Does nothing if it runs.",
    idempotent=True,
)
async def resume_vm(context: Context, name: str) -> VmChanged:
    """Resume a paused VM and set its clock."""
    return await _command(context, name, Command.RESUME)


@_command_at("recover", Status.RUNNING)
async def recover_vm(context: Context, name: str) -> VmChanged:
    """Regain control of a VM whose reason is `control_lost`."""
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
        "Make new VMs that continue from the present state of a running or paused VM: with the same programs, memory "
        "and disk, but their own name and ids. The VM keeps running. Use it to try several things from one state.",
    ),
    client_timeout_s=600,
    journaled=True,
    examples={"Three copies": {"count": 3}, "Copies by name": {"names": ["try-1", "try-2"]}},
)
async def fork_vm(context: Context, name: str, *, body: ForkVm) -> VmForked:
    """Create VMs that continue from this VM's present state; it keeps running.

    Each has this VM's memory and disk, and receives its own identity before it is `running`. The VM must be running or
    paused. With `wait`, `Volant-Wait` is `met` when all of them are in a wanted state.
    """
    check_fork(body)
    return VmForked.of(await context.deps.vms.copies.fork(context.named(name), body, key=context.key))


@TABLE.operation(f"GET {_VM}/inspect", permission=Permission.VIEW, answer="The daemon's internal state of the VM")
async def inspect_vm(context: Context, name: str) -> JsonObject:
    """Show the daemon's internal state of a VM, to find a fault. The format may change."""
    key = context.named(name)
    found = context.deps.vms.guests.inspect(key)
    return {**found, "egress": await context.deps.egress.describe(find_vm(context.deps, key))}


@TABLE.operation(
    f"GET {_VM}/memory",
    permission=Permission.VIEW,
    answer="The current figures",
    errors=(409, 503),
    tool=Tool(
        "vms_memory",
        "Measure the memory of a VM",
        "Get a VM's present memory use in MiB: `guest` is its own kernel's view (null if it does not answer), `host` "
        "the memory that its hypervisor uses on this host. Use it when a VM seems short of memory, or to find the VM "
        "that uses most.",
    ),
)
async def vm_memory(context: Context, name: str) -> VmMemory:
    """Measure the memory of a VM, as its guest and as the host sees it.

    A measurement costs the kernel some milliseconds for each GiB, so don't repeat it every second. 409 if the VM has no
    process.
    """
    return await context.deps.vms.guests.memory(context.named(name))


@TABLE.operation(
    # Not below `/vms`, where a VM may have any name.
    "GET /api/v1/stats/vms",
    permission=Permission.VIEW,
    answer="The current figures, without VMs that have no process",
    spans=Spans(VmStats, lambda vm: vm.name),
    client="vms.stats",
)
async def vm_stats(context: Context) -> list[VmStats]:
    """Measure each VM's use of the host: processor, memory, disks, network.

    The figures count from the start of the VM's process; the difference of two measurements is the use between them.
    """
    return await context.deps.vms.guests.stats(select_vms(context.deps, context.listed))


def _check_directories(context: Context, request: CreateVm) -> None:
    """Checks the directories of a VM, as host directories belong to no project. :raises Problem: 403."""
    directories = parse_mounts(request.volumes).directories
    if directories and not context.caller.may(Permission.ADMIN):
        raise Problem(
            403,
            "host-directory-denied",
            f"only an administrator may give a VM the host's directory {directories[0].source}",
            field="volumes",
            hint="use a volume: `volar volumes create NAME`",
        )
