"""The fence of VMs that another host may start: decides whether they may run here."""

from __future__ import annotations

from typing import Protocol

import trio

from volant.host import ResourceLimits
from volant.model import CreateVm, Manifest, Movable, Problem, ProcessIdentity, VmRow


class FenceFailed(Exception):
    """A process can't be put behind the fence, so it must not run."""


class VmFence(Protocol):
    """The fence of a host as its VMs see it: movable ones do not run while another host may have started them.

    While it is closed, they are paused, and none boots. `docs/explanation/fleet.md` has the argument.
    """

    @property
    def is_open(self) -> bool:
        """Whether they may run."""

    @property
    def times_closed(self) -> int:
        """The number of times that it was closed. A guest that fails meanwhile was frozen, even if it may run again."""

    async def opened(self) -> None:
        """Waits until they may run."""

    async def closed(self) -> None:
        """Waits until they may not run any more."""

    def movable(self, request: CreateVm, manifest: Manifest | None) -> Movable:
        """Returns the properties that make a new VM movable. :raises Problem: 409, 503, no movable VM can be created
        here, or not now."""

    async def enclose(self, row: VmRow, identity: ProcessIdentity, limits: ResourceLimits) -> None:
        """Puts the process of a VM behind the fence before its guest runs, and checks that the VM still belongs to this
        host. :raises FenceFailed:"""

    async def withdraw(self, row: VmRow) -> None:
        """Prevents other hosts from starting a movable VM that is being deleted, or a VM that has come from another
        host. :raises Problem: 503, a host may still start it."""

    def check_deleted(self, row: VmRow) -> None:
        """Checks that a VM without a row was deleted. :raises Problem: 503, it is on another host."""


class NoFence(VmFence):
    """The fence of a host without a fleet, which is closed. A movable VM on such a host belongs to a fleet that the
    host has not left, and may run on another host by now."""

    is_open = False
    times_closed = 0

    async def opened(self) -> None:
        await trio.sleep_forever()

    async def closed(self) -> None:
        await trio.lowlevel.checkpoint()

    def movable(self, request: CreateVm, manifest: Manifest | None) -> Movable:
        del request, manifest
        raise Problem(
            409, "no-fleet", "this host is in no fleet, so no other host could start the VM", field="failover",
            hint="leave `failover` out; `volar fleet join` makes this host one of a fleet",
        )  # fmt: skip

    async def enclose(self, row: VmRow, identity: ProcessIdentity, limits: ResourceLimits) -> None:
        raise FenceFailed("this host has not left its fleet, and runs without it")

    def check_deleted(self, row: VmRow) -> None:
        pass

    async def withdraw(self, row: VmRow) -> None:
        if row.movable is None:
            return
        raise Problem(
            503, "no-fleet", "this host has not left its fleet, which may start the VM elsewhere", vm=row.name,
            hint="start volantd with the settings of its fleet, and let it leave",
        )  # fmt: skip
