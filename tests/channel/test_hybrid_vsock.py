"""Hypervisors that map connections to a guest's ports by a line on a Unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from volant.channel import AgentUnreachable, HybridVsock, open_channel
from volant.host import Host


@asynccontextmanager
async def hypervisor(path: Path, reply: bytes) -> AsyncIterator[list[bytes]]:
    seen: list[bytes] = []
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)

    async def serve() -> None:
        sock, _ = await listener.accept()
        with sock:
            seen.append(await sock.recv(100))
            await sock.send(reply)

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield seen


async def test_a_stream_begins_behind_the_answer(tmp_path: Path) -> None:
    with trio.fail_after(5):
        async with hypervisor(tmp_path / "s", b"OK 1073741824\nfirst bytes") as seen:
            async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
                await channel.ready()
                async with await channel.open_stream(timeout_s=5) as stream:
                    assert await stream.receive_some() == b"first bytes"
                    assert channel.statistics().streams == 1
                assert channel.statistics().streams == 0
    assert seen == [b"CONNECT 1024\n"]


@pytest.mark.parametrize("reply", [b"", b"NO\n", b"OK" + b" " * 1000])
async def test_a_refusal_is_unreachable(tmp_path: Path, reply: bytes) -> None:
    with trio.fail_after(5):
        async with hypervisor(tmp_path / "s", reply):
            async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
                with pytest.raises(AgentUnreachable, match="does not answer"):
                    await channel.open_stream(timeout_s=5)
                assert channel.statistics().streams == 0


async def test_no_socket_is_unreachable(tmp_path: Path) -> None:
    async with open_channel(Host(), HybridVsock(tmp_path / "s")) as channel:
        with pytest.raises(AgentUnreachable):
            await channel.open_stream(timeout_s=5)
