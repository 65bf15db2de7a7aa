"""HTTP to the agent: streamed both ways, bounded, with clear errors."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable, Channel

from .kit import Agent, Handler, Way


class Server:
    """Answers each request as the test says, and records what it has read."""

    def __init__(self) -> None:
        self.answer: bytes = b""
        self.handler: Handler | None = None
        self.seen = b""

    def __call__(self, sock: socket.socket) -> None:
        if self.handler is not None:
            self.handler(sock)
            return
        self.seen = b""
        while b"\r\n\r\n" not in self.seen:
            data = sock.recv(65536)
            if not data:
                return
            self.seen += data
        sock.sendall(self.answer)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def guest(way: Way, server: Server) -> Iterator[Agent]:
    agent = way.begin(server)
    yield agent
    agent.stop()


@pytest.fixture
def client(channel: Channel) -> AgentClient:
    return AgentClient(channel)


def swallow(sock: socket.socket) -> None:
    """Reads to the end and sends nothing."""
    while sock.recv(65536):
        pass


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def test_json_there_and_back(client: AgentClient, server: Server) -> None:
    server.answer = answer(b'{"a": 1}', status="409 Conflict")
    got = await client.request_json("PUT", "/v1/x?y=1", {"b": [2]}, timeout_s=5)
    assert (got.status, got.body) == (409, {"a": 1})
    head, _, body = server.seen.partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /v1/x?y=1 HTTP/1.1\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    assert body == b'{"b":[2]}'
    server.answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
    assert (await client.request_json("POST", "/", timeout_s=5)).body is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "broke HTTP"),
        (answer(b"{"), "not JSON"),
        (answer(b'"\xff"'), "not JSON"),
        (answer(b"[" * 100_000), "not JSON"),
        (answer(bytes(1024 * 1024 + 1)), "longer than"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", "more than 100 header fields"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n{}", "more than 100 header fields"),
        (b"SSH-2.0-" + b"x" * 30_000 + b"\r\n\r\n", "broke HTTP"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, "informational"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "broke HTTP"),
    ],
)
async def test_a_malformed_answer_is_a_protocol_error(
    client: AgentClient, server: Server, data: bytes, why: str
) -> None:
    server.answer = data
    with pytest.raises(AgentProtocolError, match=why) as caught:
        await client.request_json("GET", "/", timeout_s=5)
    assert len(str(caught.value)) < 500, "it gets into rows and events"


async def test_a_head_that_never_ends_is_bounded(client: AgentClient, server: Server) -> None:
    def handler(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            sock.sendall(b"A: " + b"b" * 100 + b"\r\n")

    server.handler = handler
    with pytest.raises(AgentProtocolError), trio.fail_after(20):
        await client.request_json("GET", "/", timeout_s=5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 20",
        answer(b"{}")[:-1],
        answer(bytes(100_000))[:-1],
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
    ],
)
async def test_a_truncated_answer_is_unreachable(client: AgentClient, server: Server, data: bytes) -> None:
    server.answer = data
    with pytest.raises(AgentUnreachable):
        await client.request_json("GET", "/", timeout_s=5)


@pytest.mark.parametrize("size", [0, 1, 5000, 1_000_000])
async def test_what_follows_a_body_of_known_length_is_no_part_of_it(
    client: AgentClient, server: Server, size: int
) -> None:
    body = b"0123456789" * (size // 10) + b"x" * (size % 10)
    server.answer = answer(body) + b"HTTP/1.1 200 OK"
    with trio.fail_after(20):
        async with client.stream("GET", "/", timeout_s=5) as response:
            assert await response.read(2_000_000) == body
            assert await response.receive() == b""


async def test_the_answer_to_head_has_a_length_and_no_body(client: AgentClient, server: Server) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    with trio.fail_after(20):
        async with client.stream("HEAD", "/", timeout_s=5) as response:
            assert (b"content-length", b"100") in response.headers
            assert await response.receive() == b""


async def test_silence_ends_at_the_deadline(client: AgentClient, server: Server, guest: Agent) -> None:
    server.handler = swallow
    with pytest.raises(AgentUnreachable, match="within 0"):
        await client.request_json("GET", "/slow", timeout_s=0.05)
    with pytest.raises(AgentUnreachable, match="within 0"):
        async with client.stream("GET", "/slow", timeout_s=0.05):
            pass
    with trio.fail_after(20):
        await guest.idle()


async def test_both_bodies_stream(client: AgentClient, server: Server) -> None:
    def handler(sock: socket.socket) -> None:
        # Each chunk is answered before the next is sent, so neither side may buffer.
        sock.settimeout(5)
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        data = data.partition(b"\r\n\r\n")[2]
        for _ in range(3):
            while b"\r\n" not in data.partition(b"\r\n")[2]:
                data += sock.recv(65536)
            size, _, rest = data.partition(b"\r\n")
            chunk, data = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
            sock.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk.upper()))
        sock.sendall(b"0\r\n\r\n")

    server.handler = handler
    send, receive = trio.open_memory_channel[bytes](0)

    async def body() -> AsyncIterator[bytes]:
        async for piece in receive:
            yield piece

    with trio.fail_after(20):
        async with client.stream("POST", "/", [(b"x-a", b"1")], body(), timeout_s=5) as response:
            assert response.status == 200
            assert (b"transfer-encoding", b"chunked") in response.headers
            for piece in (b"one", b"two", b"three"):
                await send.send(piece)
                assert await response.receive() == piece.upper()
            send.close()
            assert await response.receive() == b""
            assert await response.receive() == b""


def answer_at_length(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    sock.sendall(bytes(10_000_000))


async def test_a_slow_reader_blocks_the_guest(client: AgentClient, server: Server, channel: Channel) -> None:
    server.handler = answer_at_length
    with trio.fail_after(10):
        async with client.stream("GET", "/", timeout_s=5) as response:
            await trio.sleep(0.2)
            assert channel.statistics().bytes_in < 300_000
            total = 0
            async for piece in response:
                total += len(piece)
            assert total == 10_000_000


async def test_an_answer_may_come_before_the_body_is_sent(client: AgentClient, server: Server) -> None:
    server.answer = answer(b"too much", status="413 Too Large")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    with trio.fail_after(20):
        async with client.stream("PUT", "/", body=endless(), timeout_s=5) as response:
            assert response.status == 413
            assert await response.read(100) == b"too much"


async def test_a_failing_source_of_a_body_raises(client: AgentClient, server: Server, guest: Agent) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise RuntimeError("the client has left")

    server.handler = swallow
    with trio.fail_after(20):
        with pytest.raises(RuntimeError, match="the client has left"):
            async with client.stream("PUT", "/", body=failing(), timeout_s=5):
                pass
        await guest.idle()


async def test_a_switched_protocol_hands_over_the_raw_stream_with_what_was_read(
    client: AgentClient, server: Server
) -> None:
    def handler(sock: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(65536)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nfirst ")
        while data := sock.recv(65536):
            sock.sendall(data)

    server.handler = handler
    headers = [(b"connection", b"upgrade"), (b"upgrade", b"x")]
    with trio.fail_after(20):
        async with client.stream("GET", "/", headers, timeout_s=5) as response:
            assert response.status == 101
            assert response.switched
            assert await response.receive() == b""
            raw = response.upgraded()
            assert await raw.receive_some(3) == b"fir"
            await raw.send_all(b"second")
            await raw.send_eof()
            rest = b""
            while piece := await raw.receive_some():
                rest += piece
            assert rest == b"st second"


async def test_connect_hands_over_the_raw_stream(client: AgentClient, server: Server) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\n\r\nhello"
    with trio.fail_after(20):
        async with client.stream("CONNECT", "127.0.0.1:80", timeout_s=5) as response:
            assert response.switched
            assert await response.upgraded().receive_some() == b"hello"


async def test_a_refused_upgrade_is_an_ordinary_answer(client: AgentClient, server: Server) -> None:
    server.answer = answer(b"no", status="404 Not Found")
    headers = [(b"connection", b"upgrade"), (b"upgrade", b"x")]
    async with client.stream("GET", "/", headers, timeout_s=5) as response:
        assert (response.status, response.switched, await response.read(9)) == (404, False, b"no")
        with pytest.raises(ValueError, match="did not switch"):
            response.upgraded()


@pytest.mark.parametrize("target", ["/a b", "/\r\nX: y", "/ü", ""])
async def test_a_request_that_http_does_not_allow_is_refused_here(
    client: AgentClient, target: str, channel: Channel
) -> None:
    with pytest.raises(ValueError, match=r"."):
        async with client.stream("GET", target, timeout_s=5):
            pass
    assert channel.statistics().streams == 0


async def test_the_block_s_own_errors_pass_through(client: AgentClient, server: Server) -> None:
    server.answer = answer(b"{}")
    with pytest.raises(KeyError):
        async with client.stream("GET", "/", timeout_s=5):
            raise KeyError


async def test_an_agent_that_dies_in_the_middle_of_its_answer_is_unreachable(
    client: AgentClient, server: Server, guest: Agent, way: Way
) -> None:
    server.handler = answer_at_length
    with trio.fail_after(20):
        async with client.stream("GET", "/", timeout_s=5) as response:
            await response.receive()
            guest.stop()
            successor = way.begin(server)  # the link is lost when the next agent says so
            with pytest.raises(AgentUnreachable):
                await response.read(20_000_000)
    successor.stop()
