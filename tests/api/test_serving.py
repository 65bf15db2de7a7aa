"""No client, however it behaves, ends the server, holds it up or makes it grow."""

from __future__ import annotations

import gc
import json
import socket
import struct
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import pytest
import trio
import trio.testing
from msgspec.structs import replace
from quart import Response, request, websocket
from quart_trio import QuartTrio

from tests.api.kit import (
    FAST,
    UPGRADE,
    Running,
    api,
    bare,
    disconnected,
    read_answer,
    read_head,
    read_to_end,
    request as http,
    running,
    until,
)
from volant.http import ApiSettings, _serving, serve
from volant.http._connection import Connection


def quart_app() -> QuartTrio:
    app = QuartTrio("served")
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024

    @app.route("/")
    async def root() -> Response:
        return Response(b"hello")

    @app.post("/length")
    async def length() -> Response:
        return Response(str(len(await request.get_data())).encode())

    @app.post("/unread")
    async def unread() -> Response:
        return Response(b"no", status=409)

    @app.route("/endless")
    async def endless() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 65536

        response = Response(chunks())
        response.timeout = None
        return response

    @app.route("/quiet")
    async def quiet() -> Response:
        await trio.sleep_forever()
        raise AssertionError

    @app.websocket("/flood")
    async def flood() -> None:
        while True:
            await websocket.send(b"x" * 1024)

    @app.websocket("/echo")
    async def echo() -> None:
        while True:
            await websocket.send(await websocket.receive())

    return app


async def send_for_ever(stream: trio.SocketStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)


async def assert_alive(server: Running) -> None:
    answer = await server.get("/")
    assert (answer.status, answer.body) == (200, b"hello")


async def test_a_byte_after_an_upgrade_request_is_refused_and_affects_no_other_client() -> None:
    async with running(quart_app()) as server:
        for extra in (b"x", b"\x81\x80\0\0\0\0", b"y" * 100_000):
            answer = await server.ask(http("GET", "/echo", **UPGRADE) + extra)
            assert answer.status in (101, 400)
            await assert_alive(server)


async def test_a_byte_after_an_upgrade_is_answered_with_400() -> None:
    answered = trio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "websocket.disconnect":
            pass
        answered.set()

    async with running(bare(slow)) as server:
        answer = await server.ask(http("GET", "/echo", **UPGRADE) + b"x")
        assert answer.status == 400
        assert json.loads(answer.body)["status"] == 400
        with trio.fail_after(20):
            await answered.wait()


async def test_http2_is_refused_even_a_connect_without_path() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
    client.initiate_connection()
    client.send_headers(1, [(":method", "CONNECT"), (":authority", "localhost")], end_stream=True)
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            await stream.send_all(client.data_to_send())
            head = await read_to_end(stream)
        assert head.startswith(b"HTTP/1.1 505 ")
        await assert_alive(server)
        upgrade = http("GET", "/", Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="")
        assert (await server.ask(upgrade)).status == 200


async def test_a_websocket_handler_that_only_sends_ends_when_its_client_leaves() -> None:
    async with running(quart_app()) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/flood", **UPGRADE))
        await read_head(stream)
        await trio.aclose_forcefully(stream)
        with trio.fail_after(20):
            await assert_alive(server)


async def test_connection_close_is_honoured() -> None:
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("GET", "/", Connection="close"))
            assert (await read_to_end(stream)).endswith(b"hello")


async def test_a_connection_is_used_again() -> None:
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            for _ in range(3):
                await stream.send_all(http("GET", "/"))
                assert (await read_answer(stream)).body == b"hello"


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            await stream.send_all(
                http("POST", "/length", b"abc") + http("GET", "/") + http("GET", "/", Connection="close")
            )
            data = await read_to_end(stream)
        assert data.count(b"HTTP/1.1 200") == 3
        assert data.index(b"\r\n\r\n3") < data.index(b"hello")


def slow_app(gate: trio.Event | None = None) -> QuartTrio:
    """Answers that take longer than the end of a client's input takes to arrive."""
    app = quart_app()

    @app.route("/slow", methods=["GET", "POST"])
    async def slow() -> Response:
        data = await request.get_data()
        if gate is None:
            await trio.testing.wait_all_tasks_blocked(0.02)
        else:
            await gate.wait()
        assert isinstance(data, bytes)
        return Response(b"slow:" + data)

    return app


@pytest.mark.parametrize("close", [True, False])
async def test_a_client_that_half_closes_is_answered(close: bool) -> None:
    headers = {"Connection": "close"} if close else {}
    async with running(slow_app()) as server:
        for wanted, end in (
            (http("GET", "/slow", **headers), b"slow:"),
            (http("POST", "/slow", b"abc", **headers), b"slow:abc"),
            (http("POST", "/slow", Transfer_Encoding="chunked", **headers) + b"3\r\nabc\r\n0\r\n\r\n", b"slow:abc"),
            (http("GET", "/slow") + http("POST", "/slow", b"1") + http("GET", "/slow", **headers), b"slow:"),
        ):
            async with await server.connect() as stream:
                await stream.send_all(wanted)
                await stream.send_eof()
                answer = await read_to_end(stream)
            assert answer.count(b"HTTP/1.1 200 ") == wanted.count(b" /slow "), answer
            assert answer.endswith(end)


async def test_a_body_that_a_half_close_cuts_off_is_not_taken_for_a_whole_one() -> None:
    ends: list[str] = []

    async def collect(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        ends.append(message["type"])

    for body in ({"Content_Length": "10"}, {"Transfer_Encoding": "chunked"}):
        async with running(bare(collect)) as server:
            async with await server.connect() as stream:
                await stream.send_all(
                    http("POST", "/", **body) + b"4\r\nabcd\r\n"[: 4 if "Content_Length" in body else 9]
                )
                await stream.send_eof()
                assert (await read_to_end(stream)).startswith(b"HTTP/1.1 400 ")
            await until(lambda: ends == ["http.disconnect"])
            ends.clear()


async def test_a_client_that_half_closed_and_leaves_is_noticed() -> None:
    begun, gone = trio.Event(), trio.Event()

    async def stream_events(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await receive()
        begun.set()
        await disconnected(receive)
        gone.set()

    async with running(bare(stream_events)) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/"))
        await stream.send_eof()
        await begun.wait()
        assert b"first" in await stream.receive_some(65536)
        assert not gone.is_set()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        with trio.fail_after(20):
            await gone.wait()


async def test_a_client_that_closes_both_directions_is_noticed_at_the_next_write() -> None:
    gone, beat = trio.Event(), trio.Event()

    async def stream_events(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await beat.wait()
        await send({"type": "http.response.body", "body": b"second", "more_body": True})
        await receive()
        await disconnected(receive)
        gone.set()

    async with running(bare(stream_events)) as server:
        stream = await server.connect()
        await stream.send_all(http("GET", "/"))
        while b"first" not in await stream.receive_some(65536):
            pass
        await stream.aclose()
        beat.set()
        with trio.fail_after(20):
            await gone.wait()


async def test_a_client_of_a_unix_socket_that_closes_both_directions_is_noticed_at_once(tmp_path: Path) -> None:
    gone = trio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await disconnected(receive)
        gone.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve(
                bare(wait), [listener], stopping=stopping, limits=FAST, task_status=task_status
            ))  # fmt: skip
            stream = await trio.open_unix_socket(str(tmp_path / "s"))
            await stream.send_all(http("GET", "/"))
            await stream.aclose()
            with trio.fail_after(20):
                await gone.wait()
            stopping.set()


async def test_a_half_close_ends_a_websocket() -> None:
    gone = trio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        assert (await receive())["type"] == "websocket.disconnect"
        gone.set()

    async with running(bare(wait)) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("GET", "/", **UPGRADE))
            await read_head(stream)
            await stream.send_eof()
            with trio.fail_after(20):
                await gone.wait()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_request_with_two_lengths_is_the_last_of_its_connection(version: str) -> None:
    seen: list[bytes] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(name for name, _ in scope["headers"])
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    length = "Content-Length: 3\r\n" if version == "1.1" else "Connection: keep-alive\r\n"
    smuggled = f"POST / HTTP/{version}\r\nHost: x\r\n{length}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
    async with running(bare(answer)) as server:
        async with await server.connect() as stream:
            await stream.send_all(smuggled + http("GET", "/"))
            said = await read_to_end(stream)
    # HTTP/1.0 has no chunks, and h11 takes none: that is refused.
    assert said.startswith(b"HTTP/1.1 200 " if version == "1.1" else b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in said.lower()
    assert b"content-length" not in seen


@pytest.mark.parametrize(
    ("target", "path"),
    [("http://127.0.0.1/", "/"), ("HTTP://127.0.0.1", "/"), ("https://127.0.0.1/a?b=http://c/", "/a")],
)
async def test_an_absolute_target_overrides_the_host(target: str, path: str) -> None:
    scopes = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with running(bare(answer)) as server:
        assert (await server.get(target, Host="elsewhere.example")).status == 200
    (scope,) = scopes
    assert scope["raw_path"] == scope["path"].encode() == path.encode()
    assert [value for name, value in scope["headers"] if name == b"host"] == [b"127.0.0.1"]


async def test_one_empty_line_before_a_request_is_ignored() -> None:
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            for pieces in (
                [b"\r\n" + http("GET", "/")],
                [b"\r", b"\n", http("GET", "/")],
                [http("POST", "/length", b"12345") + b"\r\n", http("GET", "/")],
                [http("POST", "/length", b"12345") + b"\r\n" + http("GET", "/")],
            ):
                for piece in pieces:
                    await stream.send_all(piece)
                    await trio.testing.wait_all_tasks_blocked(0.02)
                if b"/length" in pieces[0]:
                    with trio.fail_after(20):
                        data = b""
                        while not data.endswith(b"hello"):
                            data += await stream.receive_some(65536)
                    assert data.count(b"HTTP/1.1 200 ") == 2
                else:
                    assert (await read_answer(stream)).body == b"hello"


async def test_http_1_0_keeps_a_connection_when_asked_to() -> None:
    kept = b"GET / HTTP/1.0\r\nHost: x\r\nConnection: Keep-Alive\r\n\r\n"
    endless = b"GET /endless HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            for _ in range(3):
                await stream.send_all(kept)
                answer = await read_answer(stream)
                assert (answer.body, answer.headers["connection"]) == (b"hello", "keep-alive")
            await stream.send_all(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            assert b"connection: close" in (await read_to_end(stream)).lower()
        async with await server.connect() as stream:
            # The end of an answer whose length nobody knows is the end of the connection.
            await stream.send_all(endless)
            head, _ = await read_head(stream)
            assert b"connection: close" in head.lower()


async def test_an_idle_connection_is_closed() -> None:
    async with running(quart_app(), replace(FAST, keep_alive_s=0.2)) as server:
        async with await server.connect() as fresh, await server.connect() as used:
            await used.send_all(http("GET", "/"))
            await read_answer(used)
            assert await read_to_end(fresh) == b""
            assert await read_to_end(used) == b""


async def test_slow_headers_time_out() -> None:
    async with running(quart_app(), replace(FAST, header_s=0.3)) as server:
        async with await server.connect() as stream:
            with trio.fail_after(30):
                try:
                    for byte in http("GET", "/" + "a" * 100):
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(0.02)
                except trio.BrokenResourceError:
                    pass
                assert b" 408 " in await read_to_end(stream)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 33_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A:\r\n" * 100 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A:\r\n" * 102, 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET ftp://example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n", 400),
        (b"GET http:/// HTTP/1.1\r\nHost: example.org\r\n\r\n", 400),
        (b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\rGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
    ],
)
async def test_what_is_no_request_is_a_problem(raw: bytes, status: int) -> None:
    async with running(quart_app()) as server:
        answer = await server.ask(raw)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(answer.body)["request_id"] == answer.headers["x-request-id"]
        await assert_alive(server)


@pytest.mark.parametrize("path", ["/length", "/unread"])
async def test_the_answer_to_a_body_that_is_not_wanted_arrives(path: str) -> None:
    total = 20 * 1024 * 1024
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("POST", path, Content_Length=str(total)))
            chunk = b"x" * 65536
            for _ in range(total // len(chunk)):
                await stream.send_all(chunk)
            answer = await read_answer(stream)
            assert answer.status == (413 if path == "/length" else 409)
            # The rest was dropped, so the connection is as good as new.
            await stream.send_all(http("GET", "/"))
            assert (await read_answer(stream)).body == b"hello"


async def test_an_endless_unwanted_body_is_cut_off() -> None:
    limits = replace(FAST, drop_bytes=1024 * 1024)
    async with running(quart_app(), limits) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("POST", "/unread", Transfer_Encoding="chunked"))
            with trio.fail_after(30), pytest.raises(trio.BrokenResourceError):
                await send_for_ever(stream, b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


async def test_the_body_of_a_refused_client_is_hardly_waited_for() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["standing"].let_in = False
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with running(bare(refuse), replace(FAST, drop_s=60.0, finish_s=60.0)) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("POST", "/", Content_Length="100000000"))
            assert (await read_answer(stream)).status == 401
            assert await read_to_end(stream) == b""


async def test_a_body_that_is_never_asked_for_is_not_waited_for() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with running(bare(refuse), replace(FAST, drop_s=60.0)) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("POST", "/", Expect="100-continue", Content_Length="100000000"))
            data = await read_to_end(stream)
        assert data.startswith(b"HTTP/1.1 403")


async def test_a_body_is_asked_for_when_it_is_wanted() -> None:
    async with running(quart_app()) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("POST", "/length", Expect="100-continue", Content_Length="5"))
            head, _ = await read_head(stream)
            assert head.startswith(b"HTTP/1.1 100")
            await stream.send_all(b"12345")
            assert (await read_answer(stream)).body == b"5"


async def test_one_connection_too_many_gets_a_503() -> None:
    async with running(quart_app(), replace(FAST, connections=3)) as server:
        held = [await server.connect() for _ in range(3)]
        for stream in held:
            await stream.send_all(http("GET", "/quiet"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        answer = await server.get("/")
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        await held.pop().aclose()
        for _ in range(50):
            if (await server.get("/")).status == 200:
                break
            await trio.sleep(0.02)
        else:
            raise AssertionError("a free place is not given away")
        for stream in held:
            await stream.aclose()


async def test_one_address_leaves_places_to_others() -> None:
    async with running(quart_app(), replace(FAST, connections=5, connections_of_one=3)) as server:
        held = [await server.connect() for _ in range(3)]
        for stream in held:
            await stream.send_all(http("GET", "/quiet"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await server.get("/")).status == 503
        async with await trio.open_tcp_stream("127.0.0.1", server.port, local_address="127.0.0.2") as other:
            await other.send_all(http("GET", "/"))
            assert (await read_answer(other)).status == 200
        # An idle one of its own makes room.
        await held.pop().aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        idle = await server.connect()
        await assert_alive(server)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(idle)
        for stream in (idle, *held):
            await stream.aclose()


async def test_answers_that_nobody_reads_have_a_budget() -> None:
    sent: list[str] = []

    async def large(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["standing"].let_in = scope["path"] == "/known"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sent.append(scope["path"])
        await send({"type": "http.response.body", "body": bytes(10 * 2**20), "more_body": True})
        await disconnected(receive)

    async with running(bare(large), replace(FAST, unread=25 * 2**20)) as server:
        held = []
        for number, path in enumerate(("/known", "/stranger", "/known", "/known")):
            held.append(await server.connect())
            await held[-1].send_all(http("GET", path))
            with trio.fail_after(30):
                while len(sent) == number:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.05)
        first, stranger, *others = held
        # Each of the four has some MiB in the kernel. The stranger was cut off first, then the one that waited longest.
        for stream in (stranger, first):
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(stream)
        for stream in others:
            assert len(await stream.receive_some(2**20)) > 0
        for stream in held:
            await stream.aclose()


async def test_unix_sockets_have_places_that_tcp_can_not_take(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(str(tmp_path / "s"))
        tcp.bind(("127.0.0.1", 0))
        for each in (unix, tcp):
            each.listen()
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            limits = replace(FAST, connections=3)
            await nursery.start(lambda task_status: serve(
                quart_app(), [unix, tcp], stopping=stopping, limits=limits, task_status=task_status
            ))  # fmt: skip
            held = []
            for _ in range(3):
                held.append(await trio.open_tcp_stream(*tcp.getsockname()))
                await held[-1].send_all(http("GET", "/quiet"))
            await trio.testing.wait_all_tasks_blocked(0.05)
            async with await trio.open_unix_socket(str(tmp_path / "s")) as administrator:
                await administrator.send_all(http("GET", "/"))
                assert (await read_answer(administrator)).status == 200
            for stream in held:
                await stream.aclose()
            stopping.set()


async def test_many_idle_connections_do_not_block_other_clients() -> None:
    async with running(quart_app(), replace(FAST, connections=3, header_s=60.0)) as server:
        busy, trickling, idle = [await server.connect() for _ in range(3)]
        await busy.send_all(http("GET", "/quiet"))
        await idle.send_all(http("GET", "/"))
        await read_answer(idle)
        await trickling.send_all(b"GET / HT")
        await trio.testing.wait_all_tasks_blocked(0.05)
        # The one that trickles is the nearest to its deadline, the idle one comes after it.
        await assert_alive(server)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(trickling)
        hoarded = [await server.connect() for _ in range(10)]
        await assert_alive(server)
        for stream in (busy, trickling, idle, *hoarded):
            await stream.aclose()


async def test_clients_with_unwanted_bodies_do_not_block_others() -> None:
    async with running(quart_app(), replace(FAST, connections=3, drop_s=60)) as server:
        held = [await server.connect() for _ in range(3)]
        for stream in held:
            await stream.send_all(http("POST", "/unread", Content_Length="1000"))
            assert (await read_answer(stream)).status == 409
        await assert_alive(server)
        # Its rest of a body still came in time.
        await held[-1].send_all(b"x" * 1000 + http("GET", "/"))
        assert (await read_answer(held[-1])).body == b"hello"
        for stream in held:
            await stream.aclose()


async def test_busy_clients_that_were_not_let_in_make_room() -> None:
    begun, begins = trio.open_memory_channel[None](0)

    async def hold(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"hello"})
            return
        scope["state"]["standing"].let_in = scope["path"] == "/known"
        await begun.send(None)
        await disconnected(receive)

    async with running(bare(hold), replace(FAST, connections=3)) as server:

        async def held(path: str) -> trio.SocketStream:
            stream = await server.connect()
            await stream.send_all(http("GET", path))
            with trio.fail_after(10):
                await begins.receive()
            return stream

        known, first, second = [await held(path) for path in ("/known", "/stranger", "/stranger")]
        # The stranger that was busy longest makes room.
        await assert_alive(server)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(first)
        hoarded = [await held("/stranger") for _ in range(5)]
        await assert_alive(server)
        with pytest.raises(trio.TooSlowError):
            await read_to_end(known, within_s=0.1)
        for stream in (known, first, second, *hoarded):
            await stream.aclose()


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    gone = trio.Event()

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, send)
            await disconnected(receive)
            nursery.cancel_scope.cancel()
        gone.set()

    async def pour(send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})

    async with running(bare(flood), replace(FAST, send_s=0.3)) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("GET", "/"))
            with trio.fail_after(20):
                await gone.wait()


async def test_stopping_takes_no_longer_than_the_grace_whatever_clients_do() -> None:
    async with running(quart_app()) as server:
        streams = [await server.connect() for _ in range(6)]
        await streams[0].send_all(http("GET", "/endless"))  # never reads
        await streams[1].send_all(http("GET", "/flood", **UPGRADE))  # never reads
        await streams[2].send_all(http("GET", "/quiet"))
        await streams[3].send_all(http("GET", "/echo", **UPGRADE))
        await streams[4].send_all(b"GET / HT")
        await streams[5].send_all(http("POST", "/length", Content_Length="1000") + b"abc")
        for stream in streams[:2]:
            await stream.receive_some(10)
        await trio.sleep(0.2)  # until the buffers of the kernel are full
        await server.stop()
        for stream in streams:
            await stream.aclose()


async def test_streams_are_notified_before_they_are_cut_and_the_app_shuts_down_last() -> None:
    order: list[str] = []
    app = quart_app()

    @app.after_serving
    async def after() -> None:
        order.append("app")

    @app.route("/polite")
    async def polite() -> Response:
        stopping = request.scope["state"]["stopping"]

        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await stopping.wait()
            order.append("stream")
            yield b"last"

        response = Response(chunks())
        response.timeout = None
        return response

    async with running(app, replace(FAST, grace_s=60.0)) as server:
        async with await server.connect() as idle, await server.connect() as stream:
            await idle.send_all(http("GET", "/"))
            await read_answer(idle)
            await stream.send_all(http("GET", "/polite"))
            _, rest = await read_head(stream)
            server.stopping.set()
            assert await read_to_end(idle) == b""
            assert b"last" in rest + await read_to_end(stream)
            with trio.fail_after(20):
                await server.stopped.wait()
    assert order == ["stream", "app"]


async def test_an_answer_after_the_stop_began_closes_its_connection() -> None:
    arrived = trio.Event()
    app = quart_app()

    @app.route("/late")
    async def late() -> Response:
        arrived.set()
        await request.scope["state"]["stopping"].wait()
        return Response(b"late")

    async with running(app, replace(FAST, grace_s=60.0)) as server:
        async with await server.connect() as stream:
            await stream.send_all(http("GET", "/late"))
            await arrived.wait()
            server.stopping.set()
            answer = await read_answer(stream)
            assert answer.headers["connection"] == "close"
            assert await read_to_end(stream) == b""


async def test_cancelling_cuts_everything_at_once() -> None:
    with trio.fail_after(20):
        with trio.CancelScope() as scope:
            async with running(quart_app()) as server:
                async with await server.connect() as stream:
                    await stream.send_all(http("GET", "/endless"))
                    await stream.receive_some(10)
                    scope.cancel()
                    await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_an_app_that_fails_outside_of_its_handlers_is_a_500() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("broken")

    async with running(bare(broken)) as server:
        answer = await server.get("/")
        assert answer.status == 500
        assert "broken" not in answer.body.decode()


async def test_a_connection_that_has_ended_is_freed_at_once(tmp_path: Path) -> None:
    """The collector would stop the event loop for half a second, once a flood has left it enough of them."""

    left: list[weakref.ref[Connection]] = []

    class Watched(Connection):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            left.append(weakref.ref(self, left.remove))

    refused = http("POST", "/api/v1/vms", Content_Length="1000000")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_serving, "Connection", Watched)
        async with api(tmp_path, ApiSettings(api_keys=("k",))) as at:
            for sent, resets in (
                (b"", False),
                (b"GET /", True),
                (http("GET", "/healthz"), False),
                (http("GET", "/healthz"), True),
                (http("GET", "/api/v1/vms", X_Volant_API_Key="k"), True),
                (refused, False),
                (refused, True),
                (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 1000 + b"\r\n", False),
            ):
                gc.disable()
                try:
                    async with await at.server.connect() as stream:
                        await stream.send_all(sent)
                        if sent.endswith(b"\r\n\r\n"):
                            await read_answer(stream)
                        await until(lambda: bool(left))
                        if resets:
                            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    await until(lambda: not left)
                finally:
                    gc.enable()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What connections write, write by write."""
    written: list[bytes] = []
    write = Connection._write

    async def record(self: Connection, data: bytes) -> None:
        written.append(data)
        await write(self, data)

    monkeypatch.setattr(Connection, "_write", record)
    return written


async def test_head_and_body_of_an_answer_go_out_together(tmp_path: Path, writes: list[bytes]) -> None:
    async with api(tmp_path) as server:
        answer = await server.client.get("/healthz")
    assert answer.json()["status"] == "ok"
    assert len(writes) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_head_without_a_body_is_sent_at_the_end_of_its_answer(writes: list[bytes], method: str) -> None:
    async def empty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with running(bare(empty)) as server:
        # Twice, as the second would get what the first has kept back.
        for _ in range(2):
            assert (await server.ask(http(method, "/"))).status == 200
    assert len(writes) == 2
