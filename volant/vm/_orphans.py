"""Orphaned hypervisors: processes with this daemon's tags that no VM's row knows.

A database that was lost, or put back from a copy, does not know of them. A person decides what becomes of one, as it
may hold a user's work: the daemon lists it, and adopts or kills it on request.

Adopted, it becomes a running VM under its old id, with its log, its console and its agent. Its row is what its command
line says: name, size, kernel, disk. The rest is lost: labels, environment, restart policy, plugin. It is a VM of
`base`, and its next boot is one of `base`'s on its old disk. Its guest keeps the configuration it got at its start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec
import trio

from actors import Ref
from volant import images
from volant.directories import DirectoryFailed, Virtiofsd
from volant.host import Host, ProcessGone, inside
from volant.hypervisor import Hypervisor, HypervisorError, Nic, ParsedMachine, VolumeDisk
from volant.journal import AdoptRow, Journal, Names, Store, ask_journal
from volant.logs import VmLogs
from volant.model import (
    BASE,
    EGRESS_ALL,
    EGRESS_NONE,
    NONE,
    Artifact,
    Boot,
    Egress,
    OrphanView,
    Problem,
    ProcessIdentity,
    Status,
    Step,
    VmRow,
    Volume,
    VolumeMount,
    is_name,
)
from volant.templates import Claim
from volant.volumes import volume_path

from ._actors import VmActors
from ._image_manifest import image_at
from ._layout import VmSettings, memory_file, processes_of_vms, vm_directory
from ._machine_spec import CUSTOM_IMAGE, machine_spec, volume_id_of
from ._network import VmNetworks, kind_behind, lease_of

_ATTACH_S = 15.0
_ADOPT_S = 60.0
_logger = logging.getLogger("volant.vm")


class Orphan(msgspec.Struct, frozen=True):
    """An orphaned hypervisor, as last read."""

    identity: ProcessIdentity
    vm_id: int
    boot: int
    machine: ParsedMachine | None
    obstacle: str | None
    """The reason why it can't be adopted."""

    def view(self) -> OrphanView:
        """Returns the view for clients."""
        machine = self.machine
        return OrphanView(
            tag=self.identity.tag,
            pid=self.identity.pid,
            vm_id=self.vm_id,
            name=machine.name if machine else None,
            cpu_cores=machine.cpu_cores if machine else None,
            memory_mb=machine.memory_mb if machine else None,
            adoptable=self.obstacle is None,
            obstacle=self.obstacle,
        )


class Orphans(msgspec.Struct):
    """The orphaned hypervisors of one daemon."""

    host: Host
    hypervisor: Hypervisor
    store: Store
    journal: Ref[Journal]
    logs: VmLogs
    actors: VmActors
    networks: VmNetworks
    virtiofsd: Virtiofsd
    names: Names
    settings: VmSettings
    instance: str

    async def list(self) -> tuple[Orphan, ...]:
        """Returns all orphans, by id. Reads all of /proc."""
        projection, settings = self.store.projection, self.settings
        found = []
        # The processes first: a VM that is launched meanwhile has its row before its process.
        for identity, vm_id, boot, claim in await processes_of_vms(self.host, self.instance):
            if any(row.tag == identity.tag for row in projection.rows()):
                continue
            try:
                machine = self.hypervisor.parse_command_line(self.host.proc.command_line(identity))
            except ProcessGone:
                # Its VM was just stopped.
                continue
            if machine is not None and claim is not None:
                try:
                    machine = _claimed(settings, machine, claim)
                except OSError:
                    # Its claim names no disk of this daemon's.
                    machine = None
            found.append(Orphan(identity, vm_id, boot, machine, self._obstacle(vm_id, machine)))
        return tuple(sorted(found, key=lambda orphan: (orphan.vm_id, orphan.boot)))

    async def adopt(self, tag: str, project: str, name: str | None = None) -> VmRow:
        """Adopts an orphan as a VM of a project; durable when this returns. `name` replaces its own.

        :raises Problem: 404; 409, it can't be adopted, or the name is taken; 503.
        """
        steps = await self._steps(tag, project, name)
        first = steps[0].row
        assert first is not None
        async with self.names.claimed([first.key]):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ADOPT_S):
                row = await ask_journal(self.journal, AdoptRow(steps))
                # The log of a VM that the database had lost was about to be removed.
                await self.logs.recall([row.id])
                await self.actors.get(row)
                _logger.info("VM %s: %s", row.name, steps[0].message, extra={"vm": row.name})
                await self.networks.reconnect_adopted(row)
                return row
        raise Problem(503, "journal-slow", "the VM was not adopted in time; it may still appear")

    async def kill(self, tag: str) -> None:
        """Ends an orphan and removes its files, unless a VM uses the same; its disk is kept. :raises Problem: 404,
        503."""
        orphan = await self._find(tag)
        try:
            with trio.fail_after(self.settings.kill_timeout_s):
                await self.host.processes.end_all(tag, orphan.identity)
        except trio.TooSlowError:
            raise Problem(503, "unkillable", f"process {orphan.identity.pid} does not end, although killed") from None
        if self.store.projection.by_id(orphan.vm_id) is None:
            await self.host.files.remove_tree(vm_directory(self.settings, orphan.vm_id))
            await self.host.files.remove_tree(memory_file(self.settings, orphan.vm_id))
            if orphan.machine is not None and orphan.machine.nic is not None:
                await self.networks.disconnect_orphan(orphan.vm_id, orphan.machine.nic)
            try:
                await self.virtiofsd.end(orphan.vm_id)
            except DirectoryFailed as error:
                _logger.error("directories of VM %d: %s", orphan.vm_id, error)
        _logger.warning("the orphaned hypervisor %s is killed", tag)

    async def _find(self, tag: str) -> Orphan:
        for orphan in await self.list():
            if orphan.identity.tag == tag:
                return orphan
        raise Problem(
            404, "orphan-not-found", f"there is no orphaned hypervisor with the process tag {tag[:100]!r}",
            hint="`volar vms orphans` lists those there are; a VM's own is stopped with its VM",
        )  # fmt: skip

    def _obstacle(self, vm_id: int, machine: ParsedMachine | None) -> str | None:
        settings, row = self.settings, self.store.projection.by_id(vm_id)
        if row is not None:
            return f"VM {row.name!r} has its id, and another process or none"
        if machine is None or not is_name(machine.name):
            return "its command line is not one that this version makes"
        if machine.root is not None and not _is_layer(settings, vm_id, machine.root.layer):
            return f"its disk is {machine.root.layer}, and not where this daemon's VMs have theirs"
        if machine.memory_file not in (None, memory_file(settings, vm_id)):
            return f"its memory is {machine.memory_file}, and not where this daemon's VMs have theirs"
        known = self._volumes()
        for disk in machine.volumes:
            volume_id = volume_id_of(disk.serial)
            if volume_id not in known or disk.path != volume_path(settings.volume_dir, volume_id):
                return f"its volume {disk.path} is none of this daemon's"
        if machine.directory_count:
            return "its command line does not say which directories of the host it has"
        if not self.host.files.exists(vm_directory(settings, vm_id)):
            return "the directory with its sockets is gone"
        return None

    def _volumes(self) -> dict[str, Volume]:
        return {volume.id: volume for volume in self.store.projection.volumes.values()}

    async def _steps(self, tag: str, project: str, name: str | None) -> tuple[Step, ...]:
        """Returns what makes a VM of it: its row, from `pending` to `running`.

        :raises Problem: 404; 409 it can't be adopted, and why.
        """
        orphan = await self._find(tag)
        machine, obstacle = orphan.machine, orphan.obstacle
        if machine is None or obstacle is not None:
            raise _not_adoptable(orphan, obstacle or "")
        row = adopted_row(self.settings, orphan, machine, name or machine.name, self.host.clock.now(), self._volumes())
        row = msgspec.structs.replace(row, project=project, hypervisor=self.hypervisor.name)
        spec = machine_spec(self.settings, row, machine.accelerator)
        try:
            # As its actor will: one that does not answer can't be controlled.
            with trio.fail_after(_ATTACH_S):
                async with self.hypervisor.attach(spec, orphan.identity) as attached:
                    await attached.status()
        except (HypervisorError, trio.TooSlowError) as error:
            raise _not_adoptable(orphan, f"it can't be controlled: {str(error) or 'it does not answer'}") from error
        pending = msgspec.structs.replace(row, status=Status.PENDING)
        starting = msgspec.structs.replace(row, status=Status.STARTING)
        message = f"the orphaned process {orphan.identity.pid} is adopted"
        return Step(pending, message), Step(starting, message), Step(row, "it runs already")


def _claimed(settings: VmSettings, machine: ParsedMachine, claim: Claim) -> ParsedMachine:
    root = machine.root
    if root is not None:
        root = msgspec.structs.replace(root, layer=inside(settings.disk_dir, claim.layer) / root.layer.name)
    return msgspec.structs.replace(machine, name=claim.name, root=root, nic=claim.nic)


def _is_layer(settings: VmSettings, vm_id: int, layer: Path) -> bool:
    directory = layer.parent
    return directory.parent == settings.disk_dir and directory.name.startswith(f"{vm_id}-")


def adopted_row(
    settings: VmSettings,
    orphan: Orphan,
    machine: ParsedMachine,
    name: str,
    now: datetime,
    volumes: Mapping[str, Volume] | None = None,
) -> VmRow:
    """Returns the row of the VM for an orphan. `volumes` are all volumes, by id.

    The mount points of its volumes are not in its command line: the next boot mounts each at `/volumes/<name>`.
    """
    image = images.load(settings.cache_dir, machine.kernel.parent.name)
    ours = image is not None and image.kernel == machine.kernel
    parameters = " ".join(image.kernel_parameters) if image is not None and ours else ""
    boot = Boot(
        kernel=_artifact(settings, machine.kernel),
        initramfs=_artifact(settings, machine.initramfs),
        rootfs=_artifact(settings, machine.root.base) if machine.root and machine.root.base else None,
        image=image_at(machine.root.image) if machine.root and machine.root.image else None,
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
        network_reason="the VM was adopted as an orphan; the name of its network is unknown",
        lease=None if machine.nic is None else lease_of(machine.nic),
        egress=_egress_of(machine.nic),
        status=Status.RUNNING,
        booted=1,
        boots=orphan.boot,
        found_boot=orphan.boot,
        started_at=now,
        image=image.digest if image is not None and ours else CUSTOM_IMAGE,
        template=machine.template.name if machine.template is not None else None,
        balloon=machine.balloon,
        volumes=tuple(_mount(disk, volumes or {}) for disk in machine.volumes),
        tag=orphan.identity.tag,
        process=orphan.identity,
        serial_socket=str(spec_socket),
        accelerator=machine.accelerator,
        agent_seen=True,
    )


def _egress_of(nic: Nic | None) -> Egress:
    """Returns the egress policy of an orphan. Its rules are lost, but their existence is known, because its DNS server
    is then its gateway, where only the daemon answers. Such a VM may connect to nothing."""
    return EGRESS_NONE if nic is not None and nic.nameservers == (nic.gateway,) else EGRESS_ALL


def _artifact(settings: VmSettings, path: Path) -> Artifact | None:
    """Returns the artifact in the cache at this path, which need not be fetched again."""
    if path != images.artifact_path(settings.cache_dir, path.name):
        return None
    return Artifact(str(path), path.name)


def _mount(disk: VolumeDisk, volumes: Mapping[str, Volume]) -> VolumeMount:
    volume = volumes[volume_id_of(disk.serial)]
    path = f"/volumes/{volume.name}"
    return VolumeMount(name=volume.name, id=volume.id, path=path, read_only=disk.read_only, writers=volume.writers)


def _not_adoptable(orphan: Orphan, why: str) -> Problem:
    return Problem(
        409, "orphan-not-adoptable", f"{orphan.identity.tag} can't be adopted: {why}",
        hint="it keeps running; `volar vms kill` ends it",
    )  # fmt: skip
