"""A held channel: its port is not used, and users of the channel wait and miss nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from volant.channel import Channel, VirtioSerial, open_channel
from volant.channel._hold import HoldablePort, PortHold
from volant.host import Host

from .kit import GuestAgent, Port, handle


@pytest.fixture
def guest(port: Port) -> Iterator[GuestAgent]:
    agent = GuestAgent(port, handle)
    yield agent
    agent.stop()


async def socket_pair(host: Host, path: Path) -> tuple[trio.SocketStream, trio.SocketStream]:
    async with host.sockets.listen_unix(path) as listener:
        return await host.sockets.connect_unix(path, 5), await listener.accept()


async def test_a_hold_interrupts_a_send_without_losing_bytes(tmp_path: Path) -> None:
    host, hold = Host(), PortHold()
    data = random.Random(7).randbytes(3_000_000)
    got = bytearray()
    ours, theirs = await socket_pair(host, tmp_path / "socket")
    with trio.fail_after(20):
        async with ours, theirs, trio.open_nursery() as nursery:
            nursery.start_soon(HoldablePort(ours, hold).send_all, data)
            while len(got) < len(data):
                got += await theirs.receive_some(50_000)
                async with hold.hold():
                    # Once the kernel's buffer is read nothing follows, although there is room.
                    while host.sockets.unread(ours)[0]:
                        got += await theirs.receive_some(500_000)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    assert host.sockets.unread(ours) == (0, 0)
    assert got == data


async def test_nothing_is_received_during_a_hold(tmp_path: Path) -> None:
    host, hold = Host(), PortHold()
    got = bytearray()
    ours, theirs = await socket_pair(host, tmp_path / "socket")

    async def read() -> None:
        port = HoldablePort(ours, hold)
        while data := await port.receive_some(100):
            got.extend(data)

    with trio.fail_after(20):
        async with ours, theirs, trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            async with hold.hold():
                await theirs.send_all(b"late")
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert (bytes(got), host.sockets.unread(ours)[1]) == (b"", 4)
            await theirs.send_eof()
    assert got == b"late"


async def test_holds_do_not_overlap_and_do_not_wait_for_operations() -> None:
    hold, order = PortHold(), list[str]()

    async def keep(name: str) -> None:
        async with hold.hold():
            order.append(name)
            await trio.testing.wait_all_tasks_blocked()
            order.append(name)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold.run, trio.sleep_forever)
            for name in "ab":
                nursery.start_soon(keep, name)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    assert order in (list("aabb"), list("bbaa"))


async def test_streams_outlive_a_hold_and_requests_wait(port: Port, guest: GuestAgent) -> None:
    async with open_channel(Host(), VirtioSerial(port.path)) as channel:
        with trio.fail_after(20):
            async with await channel.open_stream(timeout_s=5) as stream:
                await stream.send_all(b"echo\nbefore")
                assert await stream.receive_some() == b"before"
                answered = trio.Event()

                async def ask() -> None:
                    async with await channel.open_stream(timeout_s=5) as other:
                        await other.send_all(b"echo\nlate")
                        assert await other.receive_some() == b"late"
                        answered.set()

                async with trio.open_nursery() as nursery:
                    async with channel.hold() as on_the_way:
                        nursery.start_soon(ask)
                        nursery.start_soon(stream.send_all, b" after")
                        await trio.testing.wait_all_tasks_blocked(0.05)
                        assert not answered.is_set()
                        assert on_the_way() == (0, 0)
                    assert await stream.receive_some() == b" after"
                    await answered.wait()
            statistics = channel.statistics()
            assert (statistics.links, statistics.connected) == (1, True)
            assert port.clients == 1


async def test_a_lost_link_is_neither_closed_nor_made_again_during_a_hold(port: Port) -> None:
    first = GuestAgent(port, handle)
    async with open_channel(Host(), VirtioSerial(port.path)) as channel:
        with trio.fail_after(20):
            await channel.ready()
            async with channel.hold():
                first.stop()
                # The agent's hello ends the link, but nobody reads it yet.
                second = GuestAgent(port, handle)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert channel.statistics().connected
                assert port.clients == 1
            while channel.statistics().links < 2:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
            async with await channel.open_stream(timeout_s=5) as stream:
                await stream.send_all(b"echo\nhello")
                assert await stream.receive_some() == b"hello"
    second.stop()


async def test_closing_a_held_channel_raises_at_the_end(port: Port, guest: GuestAgent) -> None:
    async with trio.open_nursery() as nursery:
        opened = list[Channel]()

        async def live(scope: trio.CancelScope) -> None:
            with scope:
                async with open_channel(Host(), VirtioSerial(port.path)) as channel:
                    opened.append(channel)
                    await trio.sleep_forever()

        life = trio.CancelScope()
        nursery.start_soon(partial(live, life))
        await trio.testing.wait_all_tasks_blocked(0.01)

        async def hold() -> None:
            async with opened[0].hold() as on_the_way:
                life.cancel()
                await opened[0].closed()
                assert on_the_way() == (0, 0)

        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError, match="closed while it was held"):
            await hold()


async def test_a_guest_that_reads_nothing_does_not_prevent_a_hold(port: Port) -> None:
    """Its agent has not started, so the daemon's bytes stay in the socket."""
    async with open_channel(Host(), VirtioSerial(port.path)) as channel:
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.fail_after(20):
            async with channel.hold() as on_the_way:
                before = on_the_way()
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert on_the_way() == before
