"""The representation of VMs on the host: the paths of their files, and the tags of their processes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from volant import images, oci
from volant.host import Host, ProcessGone, inside
from volant.hypervisor import Disk
from volant.model import SNAPSHOT, ProcessIdentity, VmRow
from volant.templates import Claim, claim_in, standby_tag_prefix


def instance_of(state_dir: Path) -> str:
    """Returns a short name of a state directory, the same after each restart of the daemon."""
    return hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:10]


def tag_of(instance: str, row: VmRow) -> str:
    """Returns the process tag of a VM's next boot."""
    return f"volant-{instance}-{row.id}.{row.boots + 1}"


def parse_tag(instance: str, tag: str) -> tuple[int, int] | None:
    """Returns the id and the boot of the VM with this process tag; None if no VM of this instance owns it."""
    found = re.fullmatch(rf"volant-{re.escape(instance)}-([1-9][0-9]{{0,17}})\.([1-9][0-9]{{0,17}})", tag)
    return (int(found[1]), int(found[2])) if found else None


class TaggedProcess(NamedTuple):
    """The hypervisor's process of a VM."""

    identity: ProcessIdentity
    vm_id: int
    boot: int
    claim: Claim | None
    """Set for a former warm process, whose command line names no VM."""


async def processes_of_vms(host: Host, instance: str) -> list[TaggedProcess]:
    """Returns the processes of this instance's VMs. Reads all of /proc."""
    found = []
    for identity in await host.processes.scan(f"volant-{instance}-"):
        if numbers := parse_tag(instance, identity.tag):
            found.append(TaggedProcess(identity, *numbers, None))
        elif identity.tag.startswith(standby_tag_prefix(instance)):
            try:
                directory = host.proc.working_directory(identity)
            except ProcessGone:
                continue
            if directory.parent.name == "vms" and (vm_id := _id_of(directory)):
                claim = await claim_in(host, directory)
                found.append(TaggedProcess(identity, vm_id, claim.boot if claim else 1, claim))
    return found


def _id_of(directory: Path) -> int | None:
    name = directory.name
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 19 else None


class VmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Directories, limits and deadlines of VMs."""

    state_dir: Path
    runtime_dir: Path
    cache_dir: Path
    memory_dir: Path
    """A directory on a file system in RAM."""
    disk_dir: Path
    """The directory of VMs' layers over their root filesystems; as durable as the database."""
    template_dir: Path
    snapshot_dir: Path
    """A directory that is as durable as the database."""
    volume_dir: Path
    """A directory that is as durable as the database."""
    kernel: Path | None = None
    initramfs: Path | None = None
    """Replaces the built image's initramfs if the plugin has none; likewise `kernel`."""
    max_vms: int | None = None
    memory_overcommit: float = 1.0
    """The factor by which VMs may be promised more than the host's memory."""
    return_memory: bool = True
    """Whether memory that a guest frees is returned to the host, if the guest's memory is its own."""
    nameservers: tuple[str, ...] = ()
    """DNS servers for guests with a network interface."""
    image_timeout_s: float = 300.0
    launch_timeout_s: float = 30.0
    agent_timeout_s: float = 120.0
    kill_timeout_s: float = 30.0

    def without_directories(self, text: str) -> str:
        """Returns a text for clients, with names in place of the daemon's directories: where these are on the host is
        its administrators' to know."""
        for name in ("memory_dir", "state_dir", "runtime_dir", "cache_dir"):
            text = text.replace(str(getattr(self, name)), f"<{name}>")
        return text


MEMORY, STATE, LAYER, RECORD = "memory", "state", "root.qcow2", "checkpoint.json"
"""The files of a checkpoint."""


def vm_directory(settings: VmSettings, vm_id: int) -> Path:
    """Returns the directory with a VM's sockets and console. It exists as long as a process of the VM may exist."""
    return settings.runtime_dir / "vms" / str(vm_id)


def memory_file(settings: VmSettings, vm_id: int) -> Path:
    """Returns the file that holds a guest's memory."""
    return settings.memory_dir / f"{vm_id}.mem"


def layer_directory(settings: VmSettings, row: VmRow) -> Path:
    """Returns the directory of a VM's layer."""
    return inside(settings.disk_dir, row.layer)


def root_disk(settings: VmSettings, row: VmRow) -> Disk | None:
    """Returns the disk with a VM's root filesystem, None if it has none."""
    boot = row.manifest.boot
    if boot is None or not row.layer:
        return None
    layer = layer_directory(settings, row) / "root.qcow2"
    if boot.image is not None:
        return Disk(None, layer, row.disk_mb, oci.disk_path(settings.cache_dir, boot.image.digest))
    if boot.rootfs is None:
        return None
    return Disk(images.artifact_path(settings.cache_dir, boot.rootfs.sha256), layer, row.disk_mb)


def checkpoint_at(memory_dir: Path, snapshot_dir: Path, checkpoint: str) -> Path:
    """Returns the directory of a checkpoint, whether or not it exists."""
    return inside(snapshot_dir if checkpoint.startswith(SNAPSHOT) else memory_dir, checkpoint)
