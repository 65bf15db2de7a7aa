"""A DELETE that waits while another host takes the VM over does not say that the VM is deleted: it runs on there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio

from volant.daemon._failover import Failover
from volant.fleet import Claim
from volant.model import CreateVm, Key, Manifest, Movable, Problem, VmRow, new_row
from volant.vm import Lifecycle

REQUEST = CreateVm(name="web", failover="restart")
ROW = new_row(REQUEST, Manifest(name="base"), vm_id=1, now=datetime(2026, 1, 2, tzinfo=UTC))
MINE = msgspec.structs.replace(ROW, movable=Movable(id="1", request=REQUEST, epoch=1))


class Vms:
    """A host with one VM, which ends when it is let go, and a client that deletes it."""

    def __init__(self) -> None:
        self.row: VmRow | None = MINE
        self.names = 0
        self.gone = trio.Event()
        self.projection = self._names = self
        # Of what it is made of, a DELETE needs the journal and the VMs alone.
        made_of: Any = {"vms": lambda: self, "fleet": lambda: None}
        parts: Any = (None, self, None, "h1", None, None)
        self._fence: Any = Failover(
            *parts, ttl_s=5, **made_of,
        )  # fmt: skip

    def get(self, key: Key) -> VmRow | None:
        return self.row

    async def apply(self, *request: Any, only_at: Any) -> VmRow | None:
        await trio.lowlevel.checkpoint()
        return self.row

    async def wait(self, *state: Any) -> tuple[str, None]:
        await self.gone.wait()
        return "met", None

    async def move(self, *request: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.row = None
        self.gone.set()

    async def free(self, vm: Key) -> None:
        await trio.lowlevel.checkpoint()
        self.names += 1

    async def delete(self) -> None:
        vms: Any = self
        await Lifecycle.delete(vms, MINE.key)


async def test_a_vm_that_another_host_has_taken_over_is_not_deleted() -> None:
    vms = Vms()
    refused = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vms._fence.discard, "default/web", Claim("1", "h1", 1, "restart"))
        with trio.fail_after(30):
            try:
                await vms.delete()
            except Problem as problem:
                refused = problem
    assert refused is not None
    assert (refused.status, refused.code, vms.names) == (503, "vm-moving", 0)


@pytest.mark.parametrize("row", [ROW, msgspec.structs.replace(MINE, movable=Movable(id="1", request=REQUEST, epoch=2))])
async def test_one_that_has_come_back_later_or_never_moves_is(row: VmRow) -> None:
    vms = Vms()
    await vms._fence.discard("default/web", Claim("1", "h1", 1, "restart"))
    vms.row = row
    await vms.delete()
    assert vms.names == 1
