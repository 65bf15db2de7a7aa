"""A WebSocket to a VM's guest says where the VM is, once it has moved to another host; and of no other VM.

The agent is the real one, as in `test_relay`; etcd is simulated, and what another host does there is the test's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.api.kit import Api, api, bare, running, until, websocket
from tests.api.test_tcp import listening, silent
from tests.channel.kit import Port, running as ended
from tests.fleet.test_member import member_of
from tests.names import named
from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import Claim, Fleet, put
from volant.model import Left

VM = "vms/default/demo"
MINE = Claim("the-vm", "h1", 3)
MOVED = (4307, "the VM is on the host h2 now")


@dataclass
class Place:
    """A host of a fleet with a VM `demo`, two servers on the loopback of its guest that read nothing, and a simulated
    etcd."""

    api: Api
    etcd: SimulatedEtcd
    tcp_port: int
    web_port: int
    kill: Callable[[], None]
    """Ends the guest, as the end of its hypervisor does."""

    @property
    def fleet(self) -> Fleet:
        assert self.api.deps.fleet is not None
        return self.api.deps.fleet

    async def claimed(self, claim: Claim) -> None:
        """Has a claim of the VM's name in etcd, and waits until the host knows it."""
        await self.etcd.transact([], [put(VM, msgspec.json.encode(claim))])
        await until(lambda: self.fleet.names["vms"].claim(named("demo")) == claim)

    async def gone(self, *, moved: bool) -> None:
        """Removes the VM from this host: another one has it, or a client has deleted it."""
        row = self.api.deps.store.projection.require(named("demo"))
        if moved:
            await self.api.deps.vms.move(row, Left("h2"))
        else:
            (await self.api.client.delete("/api/v1/vms/demo")).raise_for_status()
        await until(lambda: self.api.deps.store.projection.by_id(row.id) is None)


@asynccontextmanager
async def place(path: Path) -> AsyncIterator[Place]:
    async def loopback(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await trio.sleep_forever()

    etcd = SimulatedEtcd(Random(1))
    await etcd.transact([], [put(VM, msgspec.json.encode(MINE))])
    async with (
        Port(path / "port").open() as hypervisor,
        listening(silent) as tcp_port,
        running(bare(loopback)) as web,
        api(path, fleet=lambda store: member_of(etcd, lambda: [row.key for row in store.projection.rows()])) as served,
        trio.open_nursery() as nursery,
    ):
        assert served.deps.fleet is not None
        nursery.start_soon(served.deps.fleet.keep)
        served.client.headers["Volant-Host"] = "h1"
        await served.create("demo")
        found = Place(served, etcd, tcp_port, web.port, hypervisor.cut)
        await found.claimed(MINE)
        with ended(hypervisor.begin_real()):
            async with served.reaching(hypervisor):
                yield found
        nursery.cancel_scope.cancel()


def tcp(at: Place) -> str:
    return f"/ws/v1/vms/demo/tcp/{at.tcp_port}"


def port(at: Place) -> str:
    return f"/api/v1/vms/demo/ports/{at.web_port}/"


def logs(at: Place) -> str:
    return "/ws/v1/vms/demo/logs"


async def drained(connection: WebSocketConnection) -> None:
    while True:
        await connection.get_message()


async def ending(connection: WebSocketConnection) -> tuple[int, str | None]:
    with trio.fail_after(10), pytest.raises(ConnectionClosed) as closed:
        await drained(connection)
    reason = closed.value.reason
    return (1006, None) if reason is None else (int(reason.code), reason.reason)


async def pour(connection: WebSocketConnection, sent: list[int]) -> None:
    """Sends more than the guest takes, until the connection ends."""
    with suppress(ConnectionClosed):
        while True:
            await connection.send_message(b"x" * 60_000)
            sent[0] += 1


WAYS = (tcp, port, logs)


@pytest.mark.parametrize("way", WAYS)
async def test_a_websocket_says_where_its_vm_is_now(tmp_path: Path, way: Callable[[Place], str]) -> None:
    async with place(tmp_path) as at, websocket(f"ws://127.0.0.1:{at.api.server.port}{way(at)}") as connection:
        there = msgspec.structs.replace(MINE, owner="h2", epoch=4, before="h1")
        await at.claimed(there)
        await at.gone(moved=True)
        at.kill()
        assert await ending(connection) == MOVED


@pytest.mark.parametrize("way", WAYS)
async def test_a_new_vm_of_the_name_on_another_host_is_not_the_vm(tmp_path: Path, way: Callable[[Place], str]) -> None:
    async with place(tmp_path) as at, websocket(f"ws://127.0.0.1:{at.api.server.port}{way(at)}") as connection:
        await at.gone(moved=False)
        await at.claimed(Claim("another-vm", "h2", 1))
        at.kill()
        assert (await ending(connection))[0] in (1000, 1006, 1011)


@pytest.mark.parametrize("way", [tcp, port])
async def test_a_client_that_sends_hears_it_too(tmp_path: Path, way: Callable[[Place], str]) -> None:
    async with place(tmp_path) as at, websocket(f"ws://127.0.0.1:{at.api.server.port}{way(at)}") as connection:
        async with trio.open_nursery() as nursery:
            sent, before = [0], -1
            nursery.start_soon(pour, connection, sent)
            # All buffers are full then.
            while sent[0] != before:
                before = sent[0]
                await trio.sleep(0.1)
            await at.claimed(msgspec.structs.replace(MINE, owner="h2", epoch=4, before="h1"))
            at.kill()
            assert await ending(connection) == MOVED
            nursery.cancel_scope.cancel()
