"""Connections between hosts: kept for the next request if nothing speaks against it, and never in the way of one."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.certificates import Authority
from volant.fleet import Peers, _connections
from volant.model import Problem

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
Stream = trio.SSLStream[trio.SocketStream]


class Other:
    """Another host, which answers each request with the same bytes."""

    def __init__(self, answer: bytes, *, ends: bool) -> None:
        """`ends`: whether it closes the connection after an answer, without a word before."""
        self.connections = 0
        self.ended = trio.Event()
        """It has closed one."""
        self.heads: list[bytes] = []
        self.answers = trio.Event()
        """While it is not set, it answers nothing."""
        self.answers.set()
        self._answer = answer
        self._ends = ends

    async def serve(self, stream: Stream) -> None:
        self.connections += 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while head := bytes(await stream.receive_some()):
                self.heads.append(head)
                await self.answers.wait()
                await stream.send_all(self._answer)
                if self._ends:
                    break
        await trio.aclose_forcefully(stream.transport_stream)
        self.ended.set()


@asynccontextmanager
async def other(directory: Path, answer: bytes = OK, *, ends: bool = False) -> AsyncIterator[tuple[Other, Peers]]:
    authority = Authority(directory)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(authority.issue("localhost", server=True))
    found = Other(answer, ends=ends)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, found.serve, 0, served, host="127.0.0.1"))
        port = listeners[0].transport_listener.socket.getsockname()[1]
        peers = Peers(authority.client_context(), lambda name: f"localhost:{port}")
        nursery.start_soon(peers.keep)
        await trio.testing.wait_all_tasks_blocked()
        yield found, peers
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [OK, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n"])
async def test_one_connection_carries_one_request_after_the_other(tmp_path: Path, answer: bytes) -> None:
    async with other(tmp_path, answer) as (host, peers):
        for body in (None, b"{}", None):
            got = await peers.ask("h1", "/", [], timeout_s=20, body=body)
            assert got.body in (b"ok", b"")
        assert host.connections == 1
        assert not any(b"close" in head for head in host.heads)


async def test_requests_at_the_same_time_have_connections_of_their_own(tmp_path: Path) -> None:
    async with other(tmp_path) as (host, peers):
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(partial(peers.ask, "h1", "/", [], timeout_s=20))
        assert 1 <= host.connections <= 4


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + b"more",
        CHUNKED + OK,
    ],
    ids=["close", "1.0", "more", "two"],
)
async def test_an_answer_that_leaves_doubts_is_the_last_on_its_connection(tmp_path: Path, answer: bytes) -> None:
    async with other(tmp_path, answer) as (host, peers):
        for _ in range(2):
            assert (await peers.ask("h1", "/", [], timeout_s=20)).body == b"ok"
        assert host.connections == 2


async def test_an_answer_that_was_not_read_to_its_end_is_the_last_on_its_connection(tmp_path: Path) -> None:
    async with other(tmp_path) as (host, peers):
        for _ in range(2):
            async with peers.connect("h1") as client, client.stream("GET", "/", timeout_s=20) as got:
                assert got.status == 200
        assert host.connections == 2


async def test_a_connection_that_the_other_host_has_closed_fails_no_request(tmp_path: Path) -> None:
    async with other(tmp_path, ends=True) as (host, peers):
        for number in range(3):
            assert (await peers.ask("h1", "/", [], timeout_s=20)).body == b"ok"
            with trio.fail_after(20):
                await host.ended.wait()
            host.ended = trio.Event()
            assert host.connections == number + 1


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_host_that_is_lost_is_noticed_as_soon_as_on_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """And one that takes long to answer is waited for. The kernel says which it is; on loopback all is acknowledged."""
    asked = trio.Event()

    def is_acknowledged(stream: Stream) -> bool:
        asked.set()
        return is_there and real(stream)

    real = _connections._is_acknowledged
    monkeypatch.setattr(_connections, "_is_acknowledged", is_acknowledged)
    async with other(tmp_path) as (host, peers):
        await peers.ask("h1", "/", [], timeout_s=20)
        monkeypatch.setattr(_connections, "_CONNECT_S", 0.2)
        host.answers = trio.Event()
        with trio.fail_after(20):
            if not is_there:
                with pytest.raises(Problem, match="acknowledged nothing"):
                    await peers.ask("h1", "/", [], timeout_s=60)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(peers.ask, "h1", "/", [], timeout_s=60))
                await asked.wait()
                host.answers.set()
        assert host.connections == 1


async def test_an_idle_connection_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connections, "_LOOK_S", 0.01)
    async with other(tmp_path) as (host, peers):
        await peers.ask("h1", "/", [], timeout_s=20)
        with trio.fail_after(20):
            await host.ended.wait()
