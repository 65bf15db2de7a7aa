"""Which VM a hypervisor's process is of, whatever a database says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity
from volant.templates import Claim, claim_in, standby_tag_prefix

from ._steps import parse_tag


class TaggedProcess(NamedTuple):
    """One process."""

    identity: ProcessIdentity
    vm_id: int
    boot: int
    claim: Claim | None
    """Of one that waited for a VM to take it over; its command line names none."""


async def processes_of_vms(host: Host, instance: str) -> list[TaggedProcess]:
    """All that carry this instance's tags and are some VM's. Looks through all processes."""
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
