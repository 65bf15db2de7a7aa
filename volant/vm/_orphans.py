"""Hypervisors that carry this daemon's tag and that no VM owns.

They come about when a database is lost, or is put back from a copy that does not know of them. A person decides what
becomes of one, as what a program guesses to be nobody's may be somebody's work: it is listed, adopted or killed, and
never touched otherwise.

Adopted, it becomes a VM under its old id: what its command line tells (name, size, kernel, disk) is its row, and it is
running from then on, with its log, its console and its agent. What no command line tells is gone: labels, environment,
restart policy, and the plugin; it is a VM of `base`, and its next boot is one of those, on its old disk. What its guest
was told at its start goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import trio

from volant import images
from volant.host import ProcessGone, inside
from volant.hypervisor import HypervisorError, ParsedMachine
from volant.model import (
    BASE,
    NONE,
    Artifact,
    Boot,
    OrphanView,
    Problem,
    ProcessIdentity,
    Status,
    Step,
    VmRow,
    is_name,
)
from volant.templates import Claim

from ._doors import VmDoors, VmSettings
from ._network import disconnect, kind_behind, lease_of
from ._steps import CUSTOM_IMAGE, machine_spec, memory_file, vm_directory
from ._tags import processes_of_vms

_ATTACH_S = 15.0


@dataclass(frozen=True)
class Orphan:
    """One of them, as it was a moment ago."""

    identity: ProcessIdentity
    vm_id: int
    boot: int
    machine: ParsedMachine | None
    obstacle: str | None
    """Why it can't be adopted."""

    def view(self) -> OrphanView:
        """What clients see of it."""
        machine = self.machine
        return OrphanView(
            mark=self.identity.tag,
            pid=self.identity.pid,
            vm_id=self.vm_id,
            name=machine.name if machine else None,
            cpu_cores=machine.cpu_cores if machine else None,
            memory_mb=machine.memory_mb if machine else None,
            adoptable=self.obstacle is None,
            obstacle=self.obstacle,
        )


async def find_orphans(doors: VmDoors) -> list[Orphan]:
    """All of them, by id. Looks through all processes."""
    found = []
    # The processes first: one that is launched meanwhile has its row before it is there.
    for identity, vm_id, boot, claim in await processes_of_vms(doors.host, doors.instance):
        if any(row.tag == identity.tag for row in doors.store.projection.rows()):
            continue
        try:
            machine = doors.hypervisor.parse_command_line(doors.host.proc.command_line(identity))
        except ProcessGone:
            # Of a VM that was just stopped.
            continue
        if machine is not None and claim is not None:
            try:
                machine = _claimed(doors.settings, machine, claim)
            except OSError:
                # Its claim names no disk of ours.
                machine = None
        found.append(Orphan(identity, vm_id, boot, machine, _obstacle(doors, vm_id, machine)))
    return sorted(found, key=lambda orphan: (orphan.vm_id, orphan.boot))


def _claimed(settings: VmSettings, machine: ParsedMachine, claim: Claim) -> ParsedMachine:
    root = machine.root
    if root is not None:
        root = msgspec.structs.replace(root, layer=inside(settings.disk_dir, claim.layer) / root.layer.name)
    return msgspec.structs.replace(machine, name=claim.name, root=root, nic=claim.nic)


def _obstacle(doors: VmDoors, vm_id: int, machine: ParsedMachine | None) -> str | None:
    row = doors.store.projection.by_id(vm_id)
    if row is not None:
        return f"VM {row.name!r} has its id, and another process or none"
    if machine is None or not is_name(machine.name):
        return "its command line is not one that this version makes"
    if machine.root is not None and not _is_layer(doors.settings, vm_id, machine.root.layer):
        return f"its disk is {machine.root.layer}, and not where this daemon's VMs have theirs"
    if machine.memory_file not in (None, memory_file(doors.settings, vm_id)):
        return f"its memory is {machine.memory_file}, and not where this daemon's VMs have theirs"
    if not doors.host.files.exists(vm_directory(doors.settings, vm_id)):
        return "the directory with its sockets is gone"
    return None


def _is_layer(settings: VmSettings, vm_id: int, layer: Path) -> bool:
    directory = layer.parent
    return directory.parent == settings.disk_dir and directory.name.startswith(f"{vm_id}-")


async def kill_orphan(doors: VmDoors, tag: str) -> None:
    """End it and remove its files, unless a VM has the same; its disk stays. :raises Problem: 404, 503."""
    orphan = await _orphan(doors, tag)
    try:
        with trio.fail_after(doors.settings.kill_timeout_s):
            await doors.host.processes.end_all(tag, orphan.identity)
    except trio.TooSlowError:
        raise Problem(503, "unkillable", f"process {orphan.identity.pid} does not end, although killed") from None
    if doors.store.projection.by_id(orphan.vm_id) is None:
        await doors.host.files.remove_tree(vm_directory(doors.settings, orphan.vm_id))
        await doors.host.files.remove_tree(memory_file(doors.settings, orphan.vm_id))
        if orphan.machine is not None and orphan.machine.nic is not None:
            await disconnect(doors, orphan.vm_id, orphan.machine.nic)


async def steps_to_adopt(doors: VmDoors, tag: str, name: str | None) -> tuple[Step, ...]:
    """What makes a VM of it: its row, from `pending` to `running`. `name`: instead of its own.

    :raises Problem: 404; 409 it can't be adopted, and why.
    """
    orphan = await _orphan(doors, tag)
    machine, obstacle = orphan.machine, orphan.obstacle
    if machine is None or obstacle is not None:
        raise _refused(orphan, obstacle or "")
    row = _row(doors.settings, orphan, machine, name or machine.name, doors.host.clock.now())
    row = msgspec.structs.replace(row, hypervisor=doors.hypervisor.name)
    spec = machine_spec(doors.settings, row, machine.accelerator)
    try:
        # As its actor will: one that does not answer has no way to be held.
        with trio.fail_after(_ATTACH_S):
            async with doors.hypervisor.attach(spec, orphan.identity) as attached:
                await attached.status()
    except (HypervisorError, trio.TooSlowError) as error:
        raise _refused(orphan, f"it can't be controlled: {error or 'it does not answer'}") from error
    pending = msgspec.structs.replace(row, status=Status.PENDING)
    starting = msgspec.structs.replace(row, status=Status.STARTING)
    said = f"process {orphan.identity.pid}, which no VM owned, is adopted"
    return Step(pending, said), Step(starting, said), Step(row, "it runs already")


def _row(settings: VmSettings, orphan: Orphan, machine: ParsedMachine, name: str, now: datetime) -> VmRow:
    image = images.load(settings.cache_dir, machine.kernel.parent.name)
    ours = image is not None and image.kernel == machine.kernel
    parameters = " ".join(image.kernel_parameters) if image is not None and ours else ""
    boot = Boot(
        kernel=_artifact(settings, machine.kernel),
        initramfs=_artifact(settings, machine.initramfs),
        rootfs=_artifact(settings, machine.root.base) if machine.root else None,
    )
    spec_socket = vm_directory(settings, orphan.vm_id) / "console.sock"
    return VmRow(
        id=orphan.vm_id,
        name=name,
        cpu_cores=machine.cpu_cores,
        memory_mb=machine.memory_mb,
        plugin=BASE.name,
        runtime=BASE.runtime,
        manifest=BASE if boot == Boot() else msgspec.structs.replace(BASE, boot=boot),
        kernel_cmdline=machine.cmdline.removeprefix(parameters).strip(),
        created_at=now,
        updated_at=now,
        layer=machine.root.layer.parent.name if machine.root else "",
        network=NONE if machine.nic is None else kind_behind(machine.nic),
        network_reason="it was found on the host, where nobody knew of a network with a name",
        lease=None if machine.nic is None else lease_of(machine.nic),
        status=Status.RUNNING,
        booted=1,
        boots=orphan.boot,
        found_boot=orphan.boot,
        started_at=now,
        image=image.digest if image is not None and ours else CUSTOM_IMAGE,
        template=machine.template.name if machine.template is not None else None,
        balloon=machine.balloon,
        tag=orphan.identity.tag,
        process=orphan.identity,
        serial_socket=str(spec_socket),
        accelerator=machine.accelerator,
        agent_seen=True,
    )


def _artifact(settings: VmSettings, path: Path) -> Artifact | None:
    """The artifact in the cache that lies there; it need not be fetched again."""
    if path != images.artifact_path(settings.cache_dir, path.name):
        return None
    return Artifact(str(path), path.name)


async def _orphan(doors: VmDoors, tag: str) -> Orphan:
    for orphan in await find_orphans(doors):
        if orphan.identity.tag == tag:
            return orphan
    raise Problem(
        404, "orphan-not-found", f"there is no hypervisor without a VM that carries the tag {tag[:100]!r}",
        hint="`volar vms orphans` lists those there are; a VM's own is stopped with its VM",
    )  # fmt: skip


def _refused(orphan: Orphan, why: str) -> Problem:
    return Problem(
        409, "orphan-not-adoptable", f"{orphan.identity.tag} can't be adopted: {why}",
        hint="it goes on running; `volar vms kill` ends it",
    )  # fmt: skip
