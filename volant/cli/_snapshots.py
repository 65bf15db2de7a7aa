"""`volar snapshots`, and the commands of `volar vms` that copy a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from volant.client import SnapshotsOperations
from volant.model import MAX_COPIES, ForkVm, SnapshotView, TakeSnapshot

from ._complete import snapshot_names, vm_names
from ._derived import add_commands
from ._output import Output
from ._run import FAILED, TIMED_OUT, Pair, Session, command
from ._text import safe, span
from ._vms_group import name_argument, timeout_option

if TYPE_CHECKING:
    from ._streaming import Session as Streaming


@click.group(name="snapshots")
def group() -> None:
    """Manage snapshots of VMs.

    `volar vms snapshot` takes one, `volar vms create --from-snapshot` restores it as a new VM.
    """


snapshot_argument = click.argument("snapshot", shell_complete=snapshot_names)


@command(group, "list")
@click.option("--vm", shell_complete=vm_names, help="Only snapshots of this VM.")
async def list_(session: Session, vm: str | None) -> None:
    """List snapshots, also those of deleted VMs."""
    listed = session.client.snapshots
    snapshots = await (listed.list() if vm is None else listed.list_of_vm(vm))
    rows = (
        (
            each.name,
            each.status,
            each.vm,
            each.plugin,
            each.cpu_cores,
            f"{each.memory_mb} MiB",
            f"{each.size_bytes / 2**20:.0f}",
            f"{each.created_at:%Y-%m-%d %H:%M:%S}",
            each.description,
        )
        for each in snapshots
    )
    titles = ("NAME", "STATUS", "VM", "PLUGIN", "CPUS", "MEMORY", "SIZE_MB", "CREATED", "DESCRIPTION")
    session.out.listing(snapshots, titles, rows)


@command(group, "show")
@snapshot_argument
async def show(session: Session, snapshot: str) -> None:
    """Show one snapshot."""
    _show(session.out, await session.client.snapshots.get(snapshot))


@command(None, "snapshot")
@name_argument
@click.option("--name", "as_name", help="The snapshot's name; default: the VM's name and the time.")
@click.option("--description", default="", help="A description.")
@click.option("--label", "labels", type=Pair(), multiple=True, help="KEY=VALUE; may be repeated.")
async def snapshot_(
    session: Session, name: str, as_name: str | None, description: str, labels: tuple[tuple[str, str], ...]
) -> None:
    """Take a snapshot of a VM: memory, devices and disk. The VM is paused for a moment."""
    wanted = TakeSnapshot(name=as_name, description=description, labels=dict(labels))
    taken = await session.client.snapshots.take(name, wanted)
    session.out.result(
        taken,
        f"snapshot {safe(taken.name)} of {safe(taken.vm)} is ready: {taken.size_bytes / 2**20:.0f} MiB, "
        f"the guest was paused for {taken.paused_ms or 0:.0f} ms",
    )


@command(None, "fork")
@name_argument
@click.option("-n", "--count", type=click.IntRange(1, MAX_COPIES), help="How many copies; default 1.")
@click.option("--as", "names", multiple=True, metavar="NAME", help="A name for a copy; may be repeated.")
@click.option("--wait", is_flag=True, help="Wait until all of them run.")
@timeout_option
async def fork(
    session: Session, name: str, count: int | None, names: tuple[str, ...], wait: bool, timeout: float
) -> int:
    """Fork a running VM: create copies that continue from its current state.

    They have its memory and its disk, and names and ids of their own. The VM itself keeps running.
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


def _show(out: Output, snapshot: SnapshotView) -> None:
    out.facts(
        snapshot,
        (
            ("name", snapshot.name),
            ("status", snapshot.status),
            ("vm", f"{snapshot.vm} ({snapshot.vm_id})"),
            ("plugin", snapshot.plugin),
            ("cpus", snapshot.cpu_cores),
            ("memory", f"{snapshot.memory_mb} MiB"),
            ("disk", snapshot.disk),
            ("size", f"{snapshot.size_bytes / 2**20:.0f} MiB"),
            ("paused for", "" if snapshot.paused_ms is None else span(snapshot.paused_ms / 1000)),
            ("created", f"{snapshot.created_at:%Y-%m-%d %H:%M:%S} UTC"),
            ("description", snapshot.description),
            ("labels", ", ".join(f"{key}={value}" for key, value in snapshot.labels.items())),
        ),
    )


add_commands(group, "snapshots", SnapshotsOperations, besides=["get", "list_of_vm", "take"])
