"""Files of the agent itself, streamed by the client."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.guest.proxy import Behind, agent_behind
from volant.client import Client, ClientProblem, ConnectionLost


@pytest.fixture
def agent() -> Iterator[Behind]:
    with agent_behind() as behind:
        yield behind


class Pieces:
    """Some, and then perhaps an error."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = list(pieces)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._pieces:
            raise StopAsyncIteration
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece


async def test_a_file_is_written_read_and_deleted(agent: Behind, tmp_path: Path) -> None:
    path = f"{tmp_path}/a b%20\udcff"
    async with Client(agent.base_url) as client:
        assert await client.vms.write_file("demo", path, b"content", mode=0o640)
        assert not await client.vms.write_file("demo", path, Pieces(b"more ", b"content"))
        info = await client.vms.stat_file("demo", path)
        assert (info.is_directory, info.mode, info.size) == (False, 0o640, 12)
        async with client.vms.read_file("demo", path) as file:
            assert await file.read() == b"more content"
            assert file.info == info
        async with client.vms.read_file("demo", path, start=5) as file:
            assert await file.read() == b"content"
        await client.vms.delete_file("demo", path)
        assert not os.listdir(tmp_path)  # noqa: PTH208


async def test_a_body_that_fails_leaves_nothing(agent: Behind, tmp_path: Path) -> None:
    async with Client(agent.base_url) as client:
        with pytest.raises(RuntimeError, match="the source"):
            await client.vms.write_file("demo", f"{tmp_path}/x", Pieces(bytes(500_000), RuntimeError("the source")))
        with trio.fail_after(20):
            while os.listdir(tmp_path):  # noqa: PTH208, ASYNC110 - the agent is in threads
                await trio.sleep(0.01)


async def test_directories_are_tars(agent: Behind, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"1")
    async with Client(agent.base_url) as client:
        assert (await client.vms.stat_file("demo", f"{tmp_path}/d")).is_directory
        async with client.vms.get_tar("demo", f"{tmp_path}/d") as tar:
            assert await client.vms.put_tar("demo", f"{tmp_path}/e", tar)
        assert (tmp_path / "e" / "f").read_bytes() == b"1"
        with pytest.raises(ClientProblem, match="is a directory"):
            async with client.vms.read_file("demo", f"{tmp_path}/d"):
                pass
        with pytest.raises(ClientProblem, match="no directory"):
            async with client.vms.get_tar("demo", f"{tmp_path}/d/f"):
                pass
        with pytest.raises(ClientProblem, match="not empty"):
            await client.vms.delete_file("demo", f"{tmp_path}/d")
        await client.vms.delete_file("demo", f"{tmp_path}/d", recursive=True)


async def test_errors_name_the_path(agent: Behind, tmp_path: Path) -> None:
    async with Client(agent.base_url) as client:
        for ask in (client.vms.stat_file, client.vms.delete_file):
            with pytest.raises(ClientProblem, match=f"{tmp_path}/none") as missing:
                await ask("demo", f"{tmp_path}/none")
            assert missing.value.status == 404
        for path in ("relative", "/a/../b"):
            with pytest.raises(ClientProblem) as wrong:
                await client.vms.stat_file("demo", path)
            assert wrong.value.field == "path"


async def test_a_generator_that_is_refused_half_way_is_closed_at_once(agent: Behind, tmp_path: Path) -> None:
    left: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            for _ in range(200):
                yield bytes(1 << 20)
            left.append("at its end")
        finally:
            left.append("closed")

    (tmp_path / "file").touch()
    async with Client(agent.base_url) as client:
        with pytest.raises((ClientProblem, ConnectionLost)):
            await client.vms.write_file("demo", f"{tmp_path}/file/below", pieces())
        assert left == ["closed"]
