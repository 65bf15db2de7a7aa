"""Vsock: each stream is a connection of its own, also to a hostile guest."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.channel.kit import VsockHost
from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable, Channel, Vsock, open_channel
from volant.host import Host

Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def guest(path: Path, behave: Behaviour) -> AsyncIterator[None]:
    """Takes connections: reads which port each is for, calls `behave`, and ends it."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(100)
        try:
            await behave(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        listener = Host().sockets.listen_unix(path)
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield
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


async def floods(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"x" * 65536)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - nothing of it is used as a path


async def settles(channel: Channel, before: int) -> None:
    """Checks that failed connections leave nothing behind."""
    assert channel.statistics().streams == 0
    with trio.fail_after(20):
        while descriptors() > before:  # noqa: ASYNC110 - the guest of the test closes its ends
            await trio.sleep(0.01)


ANSWERED_THEN: dict[str, Behaviour] = {
    "nothing": says(b"+", then=hangs),
    "the end": says(b"+"),
    "half a head": says(b"+HTTP/1.1 200 O", then=hangs),
    "half a body": says(b"+HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", then=hangs),
    "half a body and the end": says(b"+HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
}


@pytest.mark.parametrize("what", ANSWERED_THEN)
async def test_a_silent_or_closing_guest_is_unreachable_in_time(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    async with guest(path, ANSWERED_THEN[what]), open_channel(VsockHost(path), Vsock(3)) as channel:
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
        guest(path, says(b"+" + head, then=floods)),
        open_channel(VsockHost(path), Vsock(3)) as channel,
    ):
        before = descriptors()
        with trio.fail_after(20), pytest.raises(AgentProtocolError):
            await AgentClient(channel).request_json("GET", "/healthz", timeout_s=5)
        assert channel.statistics().bytes_in < 3 * 1024 * 1024
        await settles(channel, before)


async def test_a_guest_that_nobody_runs_is_unreachable(tmp_path: Path) -> None:
    async with open_channel(VsockHost(tmp_path / "s"), Vsock(3)) as channel:
        with pytest.raises(AgentUnreachable, match="No such file"):
            await channel.open_stream(timeout_s=0.1)
        assert "No such file" in (channel.statistics().last_loss or "")
