"""Process tags: which VM and which boot a hypervisor's process belongs to, whatever a database says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity, VmRow
from volant.templates import Claim, claim_in, standby_tag_prefix


def instance_of(state_dir: Path) -> str:
    """Returns a short name of a state directory, the same after each restart of the daemon."""
    return hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:10]


def tag_of(instance: str, row: VmRow) -> str:
    """Returns the process tag of a VM's next boot."""
    return f"volant-{instance}-{row.id}.{row.boots + 1}"


def parse_tag(instance: str, tag: str) -> tuple[int, int] | None:
    """Returns the id and the boot of the VM with this process tag; None: it is no VM's of this instance."""
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
