"""Hybrid vsock: connections through a hypervisor's Unix socket, also of a hostile hypervisor."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable, Channel, HybridVsock, open_channel
from volant.channel._hybrid import connect_hybrid
from volant.host import Host

Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def hypervisor(path: Path, behave: Behaviour) -> AsyncIterator[list[bytes]]:
    """Reads a line, calls `behave`, and hangs; gives the lines."""
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        seen.append(bytes(await stream.receive_some(100)))
        try:
            await behave(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        listener = Host().sockets.listen_unix(path)
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield seen
        nursery.cancel_scope.cancel()
    listener.socket.close()


def says(data: bytes, *, then: Behaviour | None = None) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        if then is not None:
            await then(stream)

    return behave


async def hangs(stream: trio.SocketStream) -> None:
    """Waits until the daemon has left."""
    while await stream.receive_some(65536):
        pass


async def trickles(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"O")
        await trio.sleep(0.01)


async def floods(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"x" * 65536)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - nothing of it is used as a path


async def settles(channel: Channel, before: int) -> None:
    """Checks that failed connections leave nothing behind."""
    assert channel.statistics().streams == 0
    with trio.fail_after(20):
        while descriptors() > before:  # noqa: ASYNC110 - the hypervisor of the test closes its ends
            await trio.sleep(0.01)


async def test_the_stream_starts_behind_the_answer(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with hypervisor(tmp_path / "s", says(b"OK 1073741824\nfirst bytes", then=hangs)) as seen:
            async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
                await channel.ready()
                async with await channel.open_stream(timeout_s=5) as stream:
                    assert await stream.receive_some() == b"first bytes"
                    assert channel.statistics().streams == 1
                assert channel.statistics().streams == 0
    assert seen == [b"CONNECT 1024\n"]


NO_ANSWERS: dict[str, tuple[Behaviour, str]] = {
    "the end": (says(b""), "refused port 1024"),
    "a refusal": (says(b"NO\n"), "refused port 1024"),
    "half a line and the end": (says(b"OK 10737"), "refused port 1024"),
    "half a line and nothing": (says(b"OK 10737", then=hangs), "within"),
    "garbage": (says(bytes(range(256))), "refused port 1024"),
    "HTTP": (says(b"HTTP/1.1 200 OK\r\n\r\n", then=hangs), "refused port 1024"),
    "a line without an end": (says(b"OK ", then=floods), "refused port 1024"),
    "a byte now and then": (trickles, "within"),
    "nothing": (hangs, "within"),
}


@pytest.mark.parametrize("what", NO_ANSWERS)
async def test_a_malformed_answer_is_unreachable_in_time_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    behave, why = NO_ANSWERS[what]
    said = f"could not be reached within 0.2 s.*{why}|{why}"
    async with hypervisor(tmp_path / "s", behave) as seen, open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
        before = descriptors()
        for _ in range(3):
            with trio.fail_after(20), pytest.raises(AgentUnreachable, match=said):
                await channel.open_stream(timeout_s=0.2)
        # The channel retries with growing pauses.
        assert 3 <= len(seen) <= 24
        await settles(channel, before)


async def test_a_hypervisor_that_accepts_nobody_is_unreachable_in_time(tmp_path: Path) -> None:
    listener = Host().sockets.listen_unix(tmp_path / "s", backlog=0)
    with listener.socket as listening:
        listening.listen(0)
        async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
            before = descriptors()
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with trio.fail_after(30), pytest.raises(AgentUnreachable):
                        await channel.open_stream(timeout_s=0.3)

                for _ in range(20):
                    nursery.start_soon(ask)
            assert channel.statistics().streams == 0
            # Fewer, if what other tests have left was collected meanwhile.
            assert descriptors() <= before


ANSWERED_THEN: dict[str, Behaviour] = {
    "nothing": says(b"OK 1\n", then=hangs),
    "the end": says(b"OK 1\n"),
    "half a head": says(b"OK 1\nHTTP/1.1 200 O", then=hangs),
    "half a body": says(b"OK 1\nHTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", then=hangs),
    "half a body and the end": says(b"OK 1\nHTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
}


@pytest.mark.parametrize("what", ANSWERED_THEN)
async def test_a_silent_or_closing_hypervisor_is_unreachable_in_time(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    async with hypervisor(path, ANSWERED_THEN[what]), open_channel(Host(), HybridVsock(path)) as channel:
        before = descriptors()
        with trio.fail_after(20), pytest.raises(AgentUnreachable):
            await AgentClient(channel).request_json("GET", "/healthz", timeout_s=0.2)
        await settles(channel, before)


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: "]
)
async def test_a_flood_behind_the_answer_is_bounded(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "s"
    async with (
        hypervisor(path, says(b"OK 1\n" + head, then=floods)),
        open_channel(Host(), HybridVsock(path)) as channel,
    ):
        before = descriptors()
        with trio.fail_after(20), pytest.raises(AgentProtocolError):
            await AgentClient(channel).request_json("GET", "/healthz", timeout_s=5)
        assert channel.statistics().bytes_in < 3 * 1024 * 1024
        await settles(channel, before)


async def test_no_socket_is_unreachable(tmp_path: Path) -> None:
    async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
        with pytest.raises(AgentUnreachable, match="No such file"):
            await channel.open_stream(timeout_s=0.1)
        assert "No such file" in (channel.statistics().last_loss or "")


async def test_a_cancelled_connect_leaves_no_socket(tmp_path: Path) -> None:
    async with hypervisor(tmp_path / "s", hangs):
        before = descriptors()
        with trio.move_on_after(0.05):
            await connect_hybrid(Host(), tmp_path / "s", 1024, 10)
        with trio.fail_after(20):
            while descriptors() > before:  # noqa: ASYNC110 - the hypervisor of the test closes its end
                await trio.sleep(0.01)
