"""Relays to the workload and to loopback ports: bytes both ways, no smuggled requests, errors where possible."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.guest.conftest import Answer, Asker, read_all, read_until
from tests.ports import free_port
from tests.threaded_server import serve_in_threads
from volant.guest._relay import without_hops
from volant.model import agent as wire

Handler = Callable[[socket.socket, bytes], None]


class Upstream:
    """A loopback server that passes each connection and its request head to a function."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heads: list[bytes] = []
        self.handler: Handler = lambda sock, rest: None
        self.ended = threading.Event()
        serve_in_threads(self.listener, self._one)

    def _one(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(20)
            data = read_until(sock, lambda data: b"\r\n\r\n" in data)
            head, _, rest = data.partition(b"\r\n\r\n")
            self.heads.append(head)
            self.handler(sock, rest)
        self.ended.set()


@pytest.fixture
def upstream(agent: Asker) -> Iterator[Upstream]:
    server = Upstream()
    body = {"entrypoint": ["sleep", "1000"], "port": server.port, "restart": "never"}
    assert agent.ask("PUT", wire.DAEMON_WORKLOAD, body).status == 200
    yield server
    server.listener.close()


def reply(data: bytes) -> Handler:
    return lambda sock, rest: sock.sendall(data)


def test_a_request_passes_without_its_hop_by_hop_fields(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(
        b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nKeep-Alive: x\r\nX-Hop: 1\r\nX-A: b\r\nConnection: x-hop\r\n\r\nok"
    )
    answer = agent.ask(
        "GET", "/a%20b?c=d", headers="Connection: x-mine, content-length\r\nX-Mine: 1\r\nTE: x\r\nX-Y: z\r\n"
    )
    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.headers["x-a"] == "b"
    assert answer.headers["connection"] == "close"
    assert not {"keep-alive", "x-hop"} & set(answer.headers)
    lines = upstream.heads[0].split(b"\r\n")
    assert lines[0] == b"GET /a%20b?c=d HTTP/1.1"
    assert sorted(lines[1:]) == [b"connection: close", b"host: agent", b"x-y: z"]


def test_the_prefix_reaches_hidden_routes_of_the_workload(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(b"HTTP/1.1 204 No\r\n\r\n")
    assert agent.ask("GET", "/v1/workload/healthz?x").status == 204
    assert agent.ask("GET", "/v1/workload/").status == 204
    assert [head.split(b"\r\n")[0] for head in upstream.heads] == [b"GET /healthz?x HTTP/1.1", b"GET / HTTP/1.1"]


def test_large_bodies_both_ways_at_once(agent: Asker, upstream: Upstream) -> None:
    size = 5_000_000
    data = os.urandom(size)

    def echo(sock: socket.socket, rest: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        done = 0
        while done < size:
            piece = rest or sock.recv(65536)
            rest = b""
            sock.sendall(piece)
            done += len(piece)

    upstream.handler = echo
    sock = agent.open()
    sender = threading.Thread(
        target=sock.sendall, args=(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + data,)
    )
    sender.start()
    answer = Answer(read_all(sock))
    sender.join()
    assert answer.body == data


def test_a_chunked_upload_ends_with_its_last_chunk(agent: Asker, upstream: Upstream) -> None:
    got: list[bytes] = []

    def take(sock: socket.socket, rest: bytes) -> None:
        data = rest
        while b"0\r\n\r\n" not in data:
            data += sock.recv(1000)
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            data += sock.recv(1000)
        got.append(data)

    upstream.handler = take
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = Answer(agent.raw(head + b"5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"))
    assert (answer.body, answer.whole) == (b"abc", True)
    upstream.ended.wait(5)
    assert got == [b"5\r\nhello\r\n0\r\n\r\n"]


def test_a_workload_that_keeps_its_connection_open_does_not_delay_the_end(agent: Asker, upstream: Upstream) -> None:
    answered, was_answered = threading.Event(), list[bool]()

    def stay(sock: socket.socket, rest: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\nsecond")
        was_answered.append(answered.wait(30))

    upstream.handler = stay
    answer = agent.ask("GET", "/")
    answered.set()
    assert answer.body == b"ok"
    assert upstream.ended.wait(30)
    assert was_answered == [True]


def test_a_body_up_to_the_end_of_the_connection(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(b"HTTP/1.0 200 OK\r\n\r\nuntil the end")
    assert agent.ask("GET", "/").body == b"until the end"


def test_an_answer_to_head_has_no_body(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    assert agent.raw(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"\r\n\r\n")


def test_interim_answers_pass(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert agent.raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").startswith(
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200"
    )


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"hello there\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    ],
)
def test_a_malformed_answer_is_a_502(agent: Asker, upstream: Upstream, answer: bytes) -> None:
    upstream.handler = reply(answer)
    got = agent.ask("GET", "/")
    assert got.status == 502
    assert got.headers["content-type"] == "application/problem+json"


def test_a_truncated_answer_stays_truncated(agent: Asker, upstream: Upstream) -> None:
    upstream.handler = reply(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel")
    answer = agent.ask("GET", "/")
    assert answer.status == 200
    assert not answer.whole


def test_a_request_waits_for_a_workload_that_is_starting(agent: Asker) -> None:
    port = free_port()
    check = {"command": ["false"], "interval_s": 3600}
    body = {"entrypoint": ["sleep", "1000"], "port": port, "restart": "never", "health_check": check}
    assert agent.ask("PUT", wire.DAEMON_WORKLOAD, body).json()["state"] == "starting"
    clients = [
        agent.open(b"GET /early HTTP/1.1\r\nHost: a\r\n\r\n"),
        agent.open(b"CONNECT localhost:%d HTTP/1.1\r\nHost: a\r\n\r\n" % port),
    ]
    for client in clients:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(20)
    with socket.create_server(("127.0.0.1", port)) as listener, contextlib.ExitStack() as stack:
        listener.settimeout(20)
        for _ in clients:
            sock = stack.enter_context(listener.accept()[0])
            sock.sendall(b"HTTP/1.1 200 Here\r\nContent-Length: 0\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
        for client in clients:
            assert read_until(client, lambda data: b"\r\n\r\n" in data).startswith(b"HTTP/1.1 200 ")
    # Other ports are not waited for.
    assert agent.ask("CONNECT", f"localhost:{port - 1}").status == 502


def test_a_workload_that_refuses_is_a_502(agent: Asker) -> None:
    body = {"entrypoint": ["sleep", "1000"], "port": 1, "restart": "never"}
    agent.ask("PUT", wire.DAEMON_WORKLOAD, body)
    assert agent.ask("GET", "/").status == 502


def test_an_early_answer_passes(agent: Asker, upstream: Upstream) -> None:
    def refuse(sock: socket.socket, rest: bytes) -> None:
        sock.sendall(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
        time.sleep(0.2)

    upstream.handler = refuse
    sock = agent.open(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n" + bytes(100_000))
    assert read_until(sock, lambda data: b"\r\n\r\n" in data).startswith(b"HTTP/1.1 413 No")


def test_a_client_that_leaves_ends_the_connection_to_the_workload(agent: Asker, upstream: Upstream) -> None:
    came = threading.Event()

    def wait(sock: socket.socket, rest: bytes) -> None:
        came.set()
        assert sock.recv(1) == b""

    upstream.handler = wait
    for half_close in (False, True):
        upstream.ended.clear()
        came.clear()
        sock = agent.open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        assert came.wait(5)
        assert not upstream.ended.wait(0.1)
        sock.close()
        assert upstream.ended.wait(5)


def test_an_upgrade_becomes_a_tunnel(agent: Asker, upstream: Upstream) -> None:
    def switch(sock: socket.socket, rest: bytes) -> None:
        sock.sendall(b"HTTP/1.1 101 Switching\r\nUpgrade: echo\r\nConnection: Upgrade\r\nX-A: b\r\n\r\nfirst")
        while data := sock.recv(65536):
            sock.sendall(data.upper())
        sock.sendall(b"bye")

    upstream.handler = switch
    sock = agent.open(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: echo\r\n\r\nearly")
    data = read_until(sock, lambda data: data.endswith(b"EARLY"))
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 101 Switching"
    assert sorted(head.split(b"\r\n")[1:]) == [b"connection: upgrade", b"upgrade: echo", b"x-a: b"]
    assert rest == b"firstEARLY"
    assert {b"upgrade: echo", b"connection: upgrade"} <= set(upstream.heads[0].split(b"\r\n"))
    sock.sendall(b"more")
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"MOREbye"


def test_connect_is_bytes_both_ways_with_half_closes(agent: Asker, upstream: Upstream) -> None:
    data = os.urandom(3_000_000)

    def echo(sock: socket.socket, rest: bytes) -> None:
        sock.sendall(rest)
        while piece := sock.recv(65536):
            sock.sendall(piece)
        sock.sendall(b"the end")

    upstream.handler = echo
    sock = agent.open(f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\nHost: a\r\n\r\n".encode())

    def send() -> None:
        sock.sendall(b"\r\n\r\n" + data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    got = read_all(sock)
    sender.join()
    head, _, rest = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    # This test's server reads a head up to the first empty line.
    assert rest == data + b"the end"


def test_connect_goes_on_when_the_other_side_has_half_closed(agent: Asker, upstream: Upstream) -> None:
    got: list[bytes] = []
    done = threading.Event()

    def listen(sock: socket.socket, rest: bytes) -> None:
        sock.shutdown(socket.SHUT_WR)
        data = bytearray()
        while piece := sock.recv(65536):
            data += piece
        got.append(bytes(data))
        done.set()

    upstream.handler = listen
    sock = agent.open(f"CONNECT localhost:{upstream.port} HTTP/1.1\r\nHost: a\r\n\r\n\r\n\r\n".encode())
    read_all(sock)
    sock.sendall(bytes(1_000_000))
    sock.close()
    assert done.wait(5)
    assert got == [bytes(1_000_000)]


def test_a_slow_reader_slows_the_workload_down_and_fills_no_memory(agent: Asker, upstream: Upstream) -> None:
    sent = [0]

    def flood(sock: socket.socket, rest: bytes) -> None:
        sock.settimeout(1.0)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(TimeoutError):
            while sent[0] < 200_000_000:
                sent[0] += sock.send(bytes(65536))

    upstream.handler = flood
    agent.open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert upstream.ended.wait(15)
    assert sent[0] < 20_000_000


def test_a_connection_field_can_not_remove_framing() -> None:
    headers = [(b"connection", b"Content-Length, x , host"), (b"content-length", b"1"), (b"host", b"a"), (b"x", b"y")]
    assert without_hops(headers) == [(b"content-length", b"1"), (b"host", b"a")]
