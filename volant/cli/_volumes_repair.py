"""`volar volumes repair`."""

from __future__ import annotations

import secrets

import click
import trio

from volant.model import CreateVm, Status

from ._complete import volume_names
from ._run import Failure
from ._streaming import Session, command
from ._text import safe

_BOOT_S = 600.0
"""How long the VM may take: the first boot on a host builds the boot image."""
_TTL = "15m"
"""The lifetime of the VM if this command is killed."""


@command(None, "repair")
@click.argument("volume", shell_complete=volume_names)
async def repair(session: Session, volume: str) -> None:
    """Make a volume readable again after its last writer was killed.

    A VM that mounts the volume for writing is booted, and then deleted. Its kernel replays the journal.
    """
    vms = session.client.vms
    request = CreateVm(
        name=f"repair-{secrets.token_hex(4)}", volumes=(f"{volume}:/volume:nocopy",), network="none", ttl=_TTL
    )
    vm = await vms.create(request)
    try:
        waited = await vms.wait(vm.name, (Status.RUNNING,), timeout_s=_BOOT_S)
    finally:
        with trio.CancelScope(shield=True):
            await vms.delete(vm.name)
    if waited.outcome != "met":
        reason = None if waited.vm is None else waited.vm.reason
        why = f"its VM does not run after {_BOOT_S:g} s" if reason is None else reason.message
        raise Failure(f"volume {volume!r} is not repaired: {why}")
    session.out.result(await session.client.volumes.get(volume), f"volume {safe(volume)} can be read")
