"""The real agent in a process of its own, on each transport: promises of streams hold end to end."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest
import trio

from tests.threaded_server import serve_in_threads
from volant.channel import AgentClient, AgentUnreachable, Channel, ChannelStream, open_channel
from volant.model.agent import EXEC, FILES, HEALTHZ, INFO

from .kit import Way, handle, running

pytestmark = pytest.mark.programs

MIB = 1024 * 1024


@pytest.fixture
def process(way: Way) -> Iterator[subprocess.Popen[bytes]]:
    with running(way.begin_real()) as process:
        yield process


@pytest.fixture
async def channel(way: Way, process: subprocess.Popen[bytes]) -> AsyncIterator[Channel]:
    async with open_channel(way.host, way.address) as channel:
        yield channel


@pytest.fixture
def client(channel: Channel) -> AgentClient:
    return AgentClient(channel)


@pytest.fixture
def loopback() -> Iterator[int]:
    """The port of a server on the guest's loopback that behaves as the test agents do."""

    def serve(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            handle(sock)

    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        thread = serve_in_threads(listener, serve)
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


async def read_all(stream: ChannelStream) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some():
        data += piece
    return bytes(data)


async def streams_of(client: AgentClient) -> int:
    """Returns how many streams the agent has, besides this request's own."""
    answer = await client.request_json("GET", INFO, timeout_s=10)
    count = answer.body["streams"]["streams"] - 1
    assert isinstance(count, int)
    return count


async def idle(client: AgentClient) -> None:
    with trio.fail_after(20):
        while await streams_of(client):  # noqa: ASYNC110 - another process's
            await trio.sleep(0.02)


async def test_a_megabyte_goes_there_and_back_with_half_closes(client: AgentClient, loopback: int) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    with trio.fail_after(30):
        async with client.stream("CONNECT", f"127.0.0.1:{loopback}", timeout_s=10) as response:
            assert response.status == 200
            stream = response.upgraded()
            await stream.send_all(b"hash\n")
            await stream.send_all(data)
            await stream.send_eof()
            assert await read_all(stream) == hashlib.sha256(data).hexdigest().encode()
        await idle(client)


async def test_a_file_is_uploaded_and_downloaded_intact(client: AgentClient, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(5 * MIB)
    target = FILES + str(tmp_path / "file").lstrip("/")

    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    with trio.fail_after(30):
        async with client.stream("PUT", target, [(b"content-length", b"%d" % len(data))], body(), timeout_s=20) as put:
            assert put.status in (200, 201, 204), await put.read(MIB)
        async with client.stream("GET", target, timeout_s=20) as got:
            assert await got.read(10 * MIB) == data


async def test_a_client_that_leaves_cancels_its_request(client: AgentClient, tmp_path: Path) -> None:
    begun, survived = tmp_path / "begun", tmp_path / "survived"
    command = ["sh", "-c", f"touch {begun}; sleep 1; touch {survived}"]
    body = msgspec.json.encode({"command": command})
    with trio.fail_after(30):
        async with client.stream("POST", EXEC, body=body, timeout_s=10) as response:
            assert response.status == 200
            while not begun.exists():  # noqa: ASYNC110 - another process's
                await trio.sleep(0.01)
        await idle(client)
        await trio.sleep(1)
    assert not survived.exists()


async def test_a_killed_agent_is_found_again_and_truncated_answers_are_noticed(way: Way) -> None:
    # It ends with its client or its agent, as nobody reads its output.
    source = [sys.executable, "-c", "import sys; [sys.stdout.write('x' * 100000) for _ in range(200)]"]
    body = msgspec.json.encode({"command": source})
    async with open_channel(way.host, way.address) as channel:
        client = AgentClient(channel)
        with trio.fail_after(90), ExitStack() as ends:
            process = ends.enter_context(running(way.begin_real()))
            for _ in range(4):
                assert (await client.request_json("GET", HEALTHZ, timeout_s=20)).status == 200
                async with client.stream("POST", EXEC, body=body, timeout_s=10) as response:
                    await response.receive()
                    process.kill()
                    process = ends.enter_context(running(way.begin_real()))
                    with pytest.raises(AgentUnreachable):
                        await response.read(100 * MIB)
            assert (await client.request_json("GET", HEALTHZ, timeout_s=20)).status == 200
