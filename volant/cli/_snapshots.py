"""`volar snapshots`, and the commands of `volar vms` that copy a VM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from volant.client import SnapshotsOperations
from volant.model import MAX_COPIES, ForkVm, PullSnapshot, PushSnapshot, SnapshotView

from ._complete import snapshot_names, vm_names
from ._derived import Shown, add_commands, derived
from ._image_options import registry_options
from ._lazy_group import LazyGroup
from ._options import listing
from ._registry_auth import registry_auth
from ._run import FAILED, TIMED_OUT, Session, command
from ._shown import Sheet, show_list
from ._text import safe, size
from ._vms_group import name_argument, timeout_option

if TYPE_CHECKING:
    from ._streaming import Session as Streaming


@click.group(name="snapshots", cls=LazyGroup)
def group() -> None:
    """Manage snapshots of VMs.

    `volar vms snapshot` takes one, `volar vms create --from-snapshot` restores it as a new VM.
    """


snapshot_argument = click.argument("snapshot", shell_complete=snapshot_names)


@command(group, "list")
@listing
@click.option("--vm", shell_complete=vm_names, help="Only snapshots of this VM.")
async def list_(session: Session, vm: str | None) -> None:
    """List snapshots, including those of deleted VMs."""
    listed = session.client.snapshots
    show_list(session.out, await (listed.list() if vm is None else listed.list_of_vm(vm)), _SHEET)


@command(group, "push")
@snapshot_argument
@click.argument("reference")
@registry_options
async def push(
    session: Session, snapshot: str, reference: str, authfile: Path | None, registry_secret: str | None
) -> int | None:
    """Send a snapshot to a registry, as REGISTRY/NAME:TAG. Data that the registry already has is not sent again.

    The snapshot contains the guest's memory, including its secrets: everyone who may read the repository can read them.
    """
    auth = registry_auth(reference, authfile, registry_secret)
    request = PushSnapshot(reference, registry_secret)

    async def send(streaming: Streaming) -> None:
        from ._transfers import showing_transfer

        async with showing_transfer(streaming.client, streaming.out, "push", reference):
            pushed = await streaming.client.snapshots.push(snapshot, request, registry_auth=auth)
        streaming.out.result(
            pushed,
            f"snapshot {safe(snapshot)} is {safe(pushed.reference)}: {size(pushed.size_bytes)} in {pushed.chunks} "
            f"chunks, {pushed.sent_chunks} were sent as {size(pushed.sent_bytes)}",
        )

    return session.stream(send)


@command(group, "pull")
@click.argument("reference")
@click.argument("name", required=False)
@registry_options
async def pull(
    session: Session, reference: str, name: str | None, authfile: Path | None, registry_secret: str | None
) -> int | None:
    """Fetch a snapshot from a registry, and name it NAME; by default it keeps its name.

    Data that this host already has is not fetched again. An interrupted transfer is continued.
    """
    auth = registry_auth(reference, authfile, registry_secret)
    request = PullSnapshot(reference, name, registry_secret)

    async def fetch(streaming: Streaming) -> None:
        from ._transfers import showing_transfer

        async with showing_transfer(streaming.client, streaming.out, "pull", reference):
            pulled = await streaming.client.snapshots.pull(request, registry_auth=auth)
        streaming.out.result(
            pulled, f"snapshot {safe(pulled.name)} of {safe(pulled.vm)} is ready: {size(pulled.size_bytes)}"
        )

    return session.stream(fetch)


@command(None, "fork")
@name_argument
@click.option("-n", "--count", type=click.IntRange(1, MAX_COPIES), help="Number of copies; default 1.")
@click.option("--as", "names", multiple=True, metavar="NAME", help="A name for a copy; may be repeated.")
@click.option("--wait", is_flag=True, help="Wait until all of them run.")
@timeout_option
async def fork(
    session: Session, name: str, count: int | None, names: tuple[str, ...], wait: bool, timeout: float
) -> int:
    """Fork a running VM: create copies that continue from its current state.

    They have its memory and its disk, but their own names and ids. The VM keeps running.
    """
    copies = await session.client.vms.fork(name, ForkVm(count=count, names=list(names) or None))
    code = 0
    if wait:
        shown = []

        async def until_all_run(streaming: Streaming) -> int:
            code = 0
            for copy in copies:
                waited = await streaming.client.vms.wait(copy.name, timeout_s=timeout)
                shown.append(waited.vm or copy)
                if waited.outcome != "met":
                    code = max(code, TIMED_OUT if waited.outcome == "timeout" else FAILED)
            return code

        code = session.stream(until_all_run) or 0
        copies = shown
    if session.out.json:
        session.out.document(copies)
        return code
    for copy in copies:
        why = f": {safe(copy.reason.message)}" if copy.reason is not None else ""
        session.out.line(f"{safe(copy.name)} is {copy.status}{why}")
    return code


_SHEET = Sheet(
    ("name", "status", "vm", "plugin", "cpu_cores", "memory_mb", "size_bytes", "created_at", "description"),
    cells={"vm": lambda snapshot: f"{snapshot.vm} ({snapshot.vm_id})"},
)
_SHOWN = Shown(
    {SnapshotView: _SHEET},
    {"take": "snapshot {name} of {vm} is ready: {size_bytes}, the guest was paused for {paused_ms}"},
)
add_commands(group, "snapshots", SnapshotsOperations, _SHOWN, besides=["list_of_vm", "take"])
take = derived("snapshots", SnapshotsOperations, "take", _SHOWN, name=name_argument)
"""Becomes `volar vms snapshot`."""
