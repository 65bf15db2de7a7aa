"""Byte streams into a guest, on each transport; on a port against the guest's own multiplexer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from volant.channel import AgentUnreachable, Channel, ChannelStream, ParkedLink, VirtioSerial, open_channel
from volant.host import Host
from volant.model.agent import MAX_STREAMS, RESERVED_STREAMS

from .kit import WAYS, Agent, GuestAgent, Port, Way, handle, settled


@pytest.fixture
def guest(way: Way) -> Iterator[Agent]:
    agent = way.begin(handle)
    yield agent
    agent.stop()


async def read_all(stream: ChannelStream) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some():
        data += piece
    return bytes(data)


async def echoes(channel: Channel, data: bytes) -> bool:
    async with await channel.open_stream(timeout_s=5) as stream:
        await stream.send_all(b"echo\n" + data)
        await stream.send_eof()
        return await read_all(stream) == data


async def test_a_paused_guest_gets_no_new_streams_and_keeps_open_ones(channel: Channel) -> None:
    with trio.fail_after(10):
        async with await channel.open_stream(timeout_s=5) as stream:
            channel.set_paused(True)
            with pytest.raises(AgentUnreachable):
                await channel.open_stream(timeout_s=0.1)
            began = trio.current_time()

            async def go_on() -> None:
                await trio.sleep(0.2)
                channel.set_paused(False)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_on)
                assert await echoes(channel, b"later")
            assert trio.current_time() - began >= 0.2
            await stream.send_all(b"echo\nstill there")
            await stream.send_eof()
            assert await read_all(stream) == b"still there"
        assert channel.statistics().last_loss is None


async def test_bytes_go_both_ways_and_each_direction_ends_alone(channel: Channel) -> None:
    with trio.fail_after(20):
        async with await channel.open_stream(timeout_s=5) as stream:
            await stream.send_all(b"hash\n")
            await stream.send_all(b"x" * 1_000_000)
            await stream.send_eof()
            assert await read_all(stream) == hashlib.sha256(b"x" * 1_000_000).hexdigest().encode()
            assert await stream.receive_some() == b""
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"more")


async def test_streams_whose_reader_sleeps_block_no_other(channel: Channel) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            sleepers = [await channel.open_stream(timeout_s=5) for _ in range(MAX_STREAMS - 8)]
            for sleeper in sleepers:
                await sleeper.send_all(b"source 1000000\n")
            # All windows are full: more bytes than HTTP/2's default for the whole connection.
            await settled()
            assert await echoes(channel, b"x" * 300_000)
            for sleeper in sleepers:
                nursery.start_soon(sleeper.aclose)


async def test_guests_that_do_not_read_block_no_other_stream(channel: Channel) -> None:
    with trio.fail_after(10):
        async with AsyncExitStack() as streams, trio.open_nursery() as nursery:
            for _ in range(40):
                stream = await streams.enter_async_context(await channel.open_stream(timeout_s=5))
                await stream.send_all(b"hold\n")
                nursery.start_soon(stream.send_all, bytes(1_000_000))
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert await echoes(channel, b"x" * 300_000)
            nursery.cancel_scope.cancel()


async def test_twenty_large_streams_do_not_mix(channel: Channel) -> None:
    async def one(number: int) -> None:
        data = random.Random(number).randbytes(1_000_000)
        async with await channel.open_stream(timeout_s=5) as stream:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await stream.send_all(b"echo\n" + data)
                    await stream.send_eof()

                nursery.start_soon(send)
                assert await read_all(stream) == data

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
    assert channel.statistics().streams == 0


async def test_closing_tells_the_guest_and_frees_the_stream(channel: Channel, guest: Agent) -> None:
    with trio.fail_after(20):
        for command in (b"hold\n", b"source 10000000\n", b"echo\n"):
            stream = await channel.open_stream(timeout_s=5)
            await stream.send_all(command)
            await trio.sleep(0.05)
            await stream.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
            await guest.idle()
    assert channel.statistics().streams == 0


async def test_a_guest_that_closes_first_ends_reading_and_then_sending(channel: Channel) -> None:
    with trio.fail_after(20):
        async with await channel.open_stream(timeout_s=5) as stream:
            await stream.send_all(b"source 5\n")
            assert await read_all(stream) == bytes(5)
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(bytes(10_000_000))
            assert await stream.receive_some() == b""


async def test_one_task_sends_and_one_receives(channel: Channel) -> None:
    async with await channel.open_stream(timeout_s=5) as stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            nursery.cancel_scope.cancel()


async def test_a_receive_is_woken_by_closing(channel: Channel) -> None:
    stream = await channel.open_stream(timeout_s=5)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()


async def test_streams_are_limited_with_a_reserve_for_the_daemon(channel: Channel) -> None:
    with trio.fail_after(10):
        streams = [await channel.open_stream(timeout_s=5) for _ in range(MAX_STREAMS)]
        with pytest.raises(AgentUnreachable, match="was free"):
            await channel.open_stream(timeout_s=0.01)
        for stream in [await channel.open_stream(timeout_s=5, reserved=True) for _ in range(RESERVED_STREAMS)]:
            await stream.aclose()
        await streams.pop().aclose()
        assert await echoes(channel, b"room")
        for stream in streams:
            await stream.aclose()


async def test_another_port_is_refused(channel: Channel) -> None:
    refusal = pytest.raises((AgentUnreachable, trio.BrokenResourceError), match=r"404|refused port 99")
    assert await echoes(channel, b"there is an agent")
    with trio.fail_after(20), refusal:
        async with await channel.open_stream(99, timeout_s=2) as stream:
            await stream.receive_some()
    assert channel.statistics().streams == 0


async def test_a_channel_that_is_closed_breaks_its_streams(way: Way, guest: Agent) -> None:
    """A stream must not outlive the actor that it was opened for."""
    async with open_channel(way.host, way.address) as channel:
        stream = await channel.open_stream(timeout_s=5)
        await stream.send_all(b"echo\nhello")
        assert await stream.receive_some() == b"hello"
    with trio.fail_after(20):
        async with stream:
            with pytest.raises(trio.BrokenResourceError, match="closed"):
                await stream.receive_some()
            with pytest.raises(trio.BrokenResourceError, match="closed"):
                await stream.send_all(b"more")
        assert channel.statistics().streams == 0
        async with open_channel(way.host, way.address) as successor:
            assert await echoes(successor, b"hello")
            await guest.idle()


async def test_statistics_count_the_bytes_of_streams(channel: Channel) -> None:
    with trio.fail_after(20):
        assert await echoes(channel, b"x" * 100_000)
    statistics = channel.statistics()
    # The guest may have sent its hello meanwhile, with as many zeros as a frame is long.
    assert 100_000 <= statistics.bytes_in < 150_000
    assert 100_000 <= statistics.bytes_out < 150_000


async def test_an_agent_that_does_not_start_is_unreachable_in_time(way: Way) -> None:
    async with open_channel(way.host, way.address) as channel:
        with pytest.raises(AgentUnreachable, match="could not be reached within 0"):
            await channel.open_stream(timeout_s=0.05)
        assert channel.statistics().streams == 0
    with pytest.raises(AgentUnreachable, match="closed"):
        await channel.open_stream(timeout_s=5)
    await channel.closed()


async def test_an_agent_that_starts_late_is_found(way: Way) -> None:
    agents: list[Agent] = []

    async def come() -> None:
        await trio.sleep(0.05)
        agents.append(way.begin(handle))

    try:
        async with open_channel(way.host, way.address) as channel, trio.open_nursery() as nursery:
            nursery.start_soon(come)
            with trio.fail_after(20):
                assert await echoes(channel, b"hello")
    finally:
        for agent in agents:
            agent.stop()


async def test_an_agent_that_is_restarted_is_found_again(way: Way) -> None:
    agent = way.begin(handle)
    try:
        async with open_channel(way.host, way.address) as channel:
            with trio.fail_after(20):
                for _ in range(3):
                    async with await channel.open_stream(timeout_s=5) as stream:
                        await stream.send_all(b"source 100000000\n")
                        await stream.receive_some()
                        agent.stop()
                        agent = way.begin(handle)
                        # A dead process ends a connection, but loses a link.
                        with suppress(trio.BrokenResourceError):
                            assert len(await read_all(stream)) < 100_000_000
                    assert await echoes(channel, b"again")
    finally:
        agent.stop()


@pytest.mark.parametrize("kind", WAYS)
async def test_a_socket_that_appears_late_is_found(tmp_path: Path, kind: str) -> None:
    way = WAYS[kind](tmp_path / "agent.sock")
    answered = trio.Event()

    async def come() -> None:
        await trio.sleep(0.05)
        async with way.open():
            agent = way.begin(handle)
            await answered.wait()
            agent.stop()

    async with open_channel(way.host, way.address) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(come)
        with trio.fail_after(20):
            assert await echoes(channel, b"hello")
            answered.set()


@pytest.mark.parametrize("seed", range(12))
async def test_the_link_recovers_after_the_host_was_killed_at_any_byte(port: Port, seed: int) -> None:
    """The host's process dies while data flows, and the next one connects before the guest has noticed."""
    guest = port.begin(handle)
    rng = random.Random(seed)
    span = rng.choice((40, 16_500, 40_000, 300_000))
    broken = 0
    for round_ in range(4):
        cut = rng.randrange(1, span)
        port.cut_after(**({"to_guest": cut} if rng.random() < 0.5 else {"to_host": cut}))
        clients = port.clients
        async with open_channel(Host(), VirtioSerial(port.path)) as channel:
            with trio.fail_after(10):
                while port.clients < clients + 2:  # until it was cut
                    try:
                        async with trio.open_nursery() as nursery:
                            for _ in range(3):
                                nursery.start_soon(echoes, channel, rng.randbytes(50_000))
                    except* (trio.BrokenResourceError, trio.ClosedResourceError):
                        broken += 1
                    except* AgentUnreachable:
                        pass
                assert await echoes(channel, b"again " * 1000), f"round {round_}"
    with trio.fail_after(20):
        await guest.idle()
    guest.stop()


@pytest.mark.parametrize("seed", range(6))
async def test_the_link_recovers_after_the_agent_was_restarted_at_any_byte(port: Port, seed: int) -> None:
    rng = random.Random(seed)
    agent = GuestAgent(port, handle)
    try:
        async with open_channel(Host(), VirtioSerial(port.path)) as channel:
            with trio.fail_after(10):
                for _ in range(3):
                    async with await channel.open_stream(timeout_s=5) as stream:
                        await stream.send_all(b"source 100000000\n")
                        left = rng.randrange(1, 500_000)
                        while left > 0:
                            left -= len(await stream.receive_some())
                        agent.stop()
                        agent = GuestAgent(port, handle)
                        with pytest.raises(trio.BrokenResourceError):
                            await read_all(stream)
                    assert await echoes(channel, b"again")
            assert channel.statistics().links >= 4
    finally:
        agent.stop()


async def parked(channel: Channel) -> ParkedLink:
    """Parks the link as soon as nothing is under way on it."""
    while (link := channel.park()) is None:  # noqa: ASYNC110 - there is no event for that
        await trio.sleep(0.01)
    return link


async def test_a_parked_link_is_the_first_of_another_channel(port: Port) -> None:
    agent = GuestAgent(port, handle)
    address = VirtioSerial(port.path)
    try:
        with trio.fail_after(20):
            async with open_channel(Host(), address) as channel:
                assert await echoes(channel, b"one")
                link = await parked(channel)
            for _ in range(2):
                async with open_channel(Host(), address, link) as channel:
                    assert channel.link == 1, "the guest need not answer first"
                    assert await echoes(channel, b"two" * 100_000)
                    link = await parked(channel)
            assert port.clients == 1
            async with open_channel(Host(), address, link) as channel:
                agent.stop()
                agent = GuestAgent(port, handle)
                while channel.statistics().last_loss is None:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert await echoes(channel, b"the next link is made")
            clients = port.clients
            async with open_channel(Host(), address) as channel:
                assert await echoes(channel, b"the one before is closed")
            assert port.clients == clients + 1
    finally:
        agent.stop()


async def test_a_link_with_an_open_stream_is_not_parked(port: Port) -> None:
    agent = GuestAgent(port, handle)
    address = VirtioSerial(port.path)
    try:
        with trio.fail_after(20):
            async with open_channel(Host(), address) as channel:
                assert channel.park() is None, "there is none yet"
                async with await channel.open_stream(timeout_s=5) as stream:
                    await stream.send_all(b"echo\nhello")
                    assert await stream.receive_some() == b"hello"
                    assert channel.park() is None
                    await stream.send_all(b"more")
                    assert await stream.receive_some() == b"more"
    finally:
        agent.stop()


async def test_a_parked_link_whose_hypervisor_has_ended_is_lost(port: Port) -> None:
    agent = GuestAgent(port, handle)
    address = VirtioSerial(port.path)
    try:
        with trio.fail_after(20):
            async with open_channel(Host(), address) as channel:
                assert await echoes(channel, b"one")
                link = await parked(channel)
            await link.stream.send_eof()
            async with open_channel(Host(), address, link) as channel:
                assert await echoes(channel, b"another link is made")
                assert channel.statistics().links > 1
    finally:
        agent.stop()


async def test_errors_of_the_block_pass_through(way: Way) -> None:
    with pytest.raises(KeyError):
        async with open_channel(way.host, way.address):
            raise KeyError
