"""Passt beside a hypervisor: an ordinary stop is no warning; a passt that died is restarted and reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio

from tests.model.kit import create
from volant.hypervisor import HypervisorError
from volant.model import VmRow, user_lease
from volant.network import NetworkFailed
from volant.network.messages import Release
from volant.vm._network import VmNetworks


@dataclass
class Processes:
    """Passt processes that end when a test wants it."""

    starts: int = 0
    end: trio.Event = field(default_factory=trio.Event)
    runs: bool = False
    connected: bool = False
    lent_to: list[int | None] = field(default_factory=list)

    async def start(self, row: VmRow) -> None:
        await trio.lowlevel.checkpoint()
        if not self.runs:
            self.starts += 1
            self.runs, self.connected = True, False

    def is_connected(self, vm_id: int) -> bool:
        return self.connected

    async def note_connected(self, vm_id: int) -> None:
        await trio.lowlevel.checkpoint()
        self.connected = True

    async def lend(self, vm_id: int, user: int | None) -> None:
        await trio.lowlevel.checkpoint()
        self.lent_to.append(user)

    async def ended(self, vm_id: int) -> None:
        await self.end.wait()
        self.end = trio.Event()
        self.runs = False


class Users:
    """A hypervisor that runs each VM as the same user."""

    @staticmethod
    def user_of(tag: str, vm_id: int) -> int:
        return 65543


@dataclass
class Live:
    """The watch over a hypervisor, and the hypervisor itself."""

    connects_itself: bool = False
    refuses: int = 0
    """So many connections, until it takes one."""
    connections: int = 0

    async def machine(self) -> Live:
        await trio.lowlevel.checkpoint()
        return self

    async def connect_network(self) -> bool:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            self.refuses -= 1
            raise HypervisorError("QEMU refused getfd: no")
        if self.connects_itself:
            return False
        self.connections += 1
        return True


@pytest.fixture
def passts() -> Processes:
    return Processes()


@pytest.fixture
def row() -> VmRow:
    return msgspec.structs.replace(create(), id=7, network="user", lease=user_lease("0123456789", 7))


async def keep(passts: Processes, row: VmRow, for_s: float, live: Live | None = None) -> None:
    """Runs the loop that a VM's actor has beside its hypervisor for `for_s` seconds."""
    store: Any = None
    users: Any = Users()
    passt: Any = passts
    machine: Any = (live or Live()).machine
    with trio.move_on_after(for_s):
        await VmNetworks(store, users, passt).keep_passt(row, machine)


async def test_an_ordinary_stop_is_no_warning(
    passts: Processes, row: VmRow, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    passts.end.set()
    with caplog.at_level(logging.WARNING):
        await keep(passts, row, 0.5)

    assert (passts.starts, caplog.messages) == (1, [])


async def test_a_passt_that_died_is_restarted_connected_and_reported(
    passts: Processes, row: VmRow, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    passts.runs = passts.connected = True
    passts.end.set()
    live = Live()
    with caplog.at_level(logging.WARNING):
        await keep(passts, row, 5, live)

    assert (passts.starts, live.connections, passts.connected, passts.lent_to) == (1, 1, True, [])
    assert "passt had ended, and was started again" in caplog.text


async def test_a_connected_passt_is_left_alone(
    passts: Processes, row: VmRow, autojump_clock: trio.testing.MockClock
) -> None:
    """As after a restart of the daemon: a second connection would end the first one."""
    passts.runs = passts.connected = True
    live = Live()
    await keep(passts, row, 600, live)

    assert (passts.starts, live.connections) == (0, 0)


async def test_a_passt_left_unconnected_by_a_killed_daemon_is_connected(
    passts: Processes, row: VmRow, autojump_clock: trio.testing.MockClock
) -> None:
    passts.runs = True
    live = Live()
    await keep(passts, row, 600, live)

    assert (passts.starts, live.connections, passts.connected) == (0, 1, True)


async def test_a_refused_connection_is_retried(
    passts: Processes, row: VmRow, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    live = Live(refuses=2)
    with caplog.at_level(logging.WARNING):
        await keep(passts, row, 600, live)

    assert (live.connections, passts.connected) == (1, True)
    assert "QEMU refused getfd: no; trying again in 1 s" in caplog.text


async def test_a_hypervisor_that_connects_by_itself_may_use_the_socket(
    passts: Processes, row: VmRow, autojump_clock: trio.testing.MockClock
) -> None:
    """An earlier version of the daemon started it."""
    live = Live(connects_itself=True)
    await keep(passts, row, 600, live)

    assert (live.connections, passts.connected, passts.lent_to) == (0, True, [65543])


async def test_a_vm_is_detached_although_its_egress_rules_stay(row: VmRow, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []

    class Passts:
        async def end(self, vm_id: int) -> None:
            ended.append(vm_id)

    class Keeper:
        async def ask(self, message: Any, *, timeout_s: float) -> None:
            assert message == Release(row.id)
            raise NetworkFailed("firewall", "nft refuses the firewall's rules")

    store: Any = None
    users: Any = Users()
    passt: Any = Passts()
    keeper: Any = Keeper()
    row = msgspec.structs.replace(row, egress="none")
    await VmNetworks(store, users, passt, keeper).detach(row)
    assert ended == [row.id]
    assert "its egress rules can't be removed now: nft refuses" in caplog.text
