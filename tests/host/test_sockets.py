"""Unix sockets: long paths, full queues, unread bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from volant.host import Host


async def test_sockets_with_long_paths_connect(host: Host, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 3)
    await host.files.mkdir(deep)
    assert stat.S_IMODE(deep.stat().st_mode) == 0o700
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    short = os.open(deep, os.O_PATH)
    await listener.bind(f"/proc/self/fd/{short}/s")
    os.close(short)
    listener.listen(1)
    with listener:
        async with await host.sockets.connect_unix(deep / "s", 1.0) as stream:
            accepted, _ = await listener.accept()
            with accepted:
                await stream.send_all(b"x")
                assert await accepted.recv(1) == b"x"
    with pytest.raises(ConnectionRefusedError):
        await host.sockets.connect_unix(deep / "s", 1.0)
    with pytest.raises(FileNotFoundError):
        await host.sockets.connect_unix(deep / "t", 1.0)


async def test_connecting_waits_while_the_queue_is_full(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with host.sockets.listen_unix(path, backlog=0).socket as listening, trio.fail_after(20):
        listening.listen(0)
        async with await host.sockets.connect_unix(path, 1.0):
            with pytest.raises(trio.TooSlowError):
                await host.sockets.connect_unix(path, 0.05)
            async with trio.open_nursery() as nursery:

                async def come() -> None:
                    async with await host.sockets.connect_unix(path, 1.0) as stream:
                        await stream.send_all(b"second")

                nursery.start_soon(come)
                await trio.testing.wait_all_tasks_blocked()
                (await listening.accept())[0].close()
                with (await listening.accept())[0] as second:
                    assert await second.recv(100) == b"second"


async def test_unread_bytes_are_counted(host: Host, tmp_path: Path) -> None:
    listener = host.sockets.listen_unix(tmp_path / "socket")
    async with (
        listener,
        await host.sockets.connect_unix(tmp_path / "socket", 5) as ours,
        await listener.accept() as theirs,
    ):
        assert host.sockets.unread(ours) == (0, 0)
        await ours.send_all(b"x" * 1000)
        await theirs.send_all(b"y" * 70)
        assert host.sockets.unread(ours)[0] > 0
        assert host.sockets.unread(ours)[1] == 70
        await theirs.receive_some(999)
        assert host.sockets.unread(ours)[0] > 0
        await theirs.receive_some(999)
        assert host.sockets.unread(ours)[0] == 0
