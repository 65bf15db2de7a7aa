"""The transport on blocking sockets: it answers and fails as the one on Trio does."""

from __future__ import annotations

import gzip
import socket
import ssl
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from volant.client import (
    Client,
    ClientError,
    ClientProblem,
    ConnectionLost,
    DeadlineExceeded,
    UnexpectedAnswer,
    Unreachable,
    _plain,
    _transport,
)
from volant.client._plain import PlainClient, run_plain
from volant.client._requests import Requests
from volant.model import CreateVm, Problem

from .kit import Handler, Request, Server, answer, problem, send_head, serving, vm
from .test_requests import break_off

Call = Callable[[Requests], Coroutine[Any, Any, Any]]


def list_vms(client: Requests) -> Coroutine[Any, Any, Any]:
    return client.vms.list()


async def ask(base_url: str, call: Call, **options: Any) -> Any:
    """Runs `call` with a plain client, in a thread, as it blocks."""
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(lambda: run_plain(call(PlainClient(base_url, **options))))


def sends(*pieces: bytes) -> Handler:
    """Returns a handler that sends these bytes as they are, and ends the connection."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        for piece in pieces:
            await stream.send_all(piece)

    return handler


async def stay_silent(request: Request, stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


BODY = b"[]"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([OK, b"Content-Length: 2\r\n\r\n", BODY], id="length"),
        pytest.param([OK, b"Transfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n"], id="chunked"),
        pytest.param([OK, b"\r\n", BODY], id="until the end of the connection"),
        pytest.param([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", OK, b"Content-Length: 2\r\n\r\n[]"], id="hints"),
        pytest.param([bytes([each]) for each in OK + b"Content-Length: 2\r\n\r\n[]"], id="byte by byte"),
    ],
)
async def test_each_framing_is_understood(pieces: list[bytes]) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = sends(*pieces)
        assert await ask(server.base_url, list_vms) == []


async def test_a_request_is_complete() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(), 201)
        server.routes["POST /api/v1/vms/demo/stop"] = answer(vm(status="stopping"))
        server.routes["GET /api/v1/vms"] = answer([vm()])
        request = CreateVm(name="demo", cpu_cores=1, memory_mb=256, labels={"ä": "ü"})
        await ask(server.base_url, lambda client: client.vms.create(request, idempotency_key="mine"), api_key="secret")
        await ask(server.base_url, lambda client: client.vms.stop("demo", grace_s=1.5))
        await ask(server.base_url, lambda client: client.vms.list(labels={"a": "1 2", "b": "x=y&"}, status="running"))
    made, stopped, listed = server.requests
    assert made.json() == {"name": "demo", "cpu_cores": 1, "memory_mb": 256, "labels": {"ä": "ü"}}
    assert made.headers["content-type"] == "application/json"
    assert (made.headers["x-volant-api-key"], made.headers["idempotency-key"]) == ("secret", "mine")
    assert made.headers["host"] == server.base_url.removeprefix("http://")
    assert made.headers["user-agent"].startswith("volant-client/")
    assert (stopped.query, stopped.headers["content-length"]) == ([("grace", "1500ms")], "0")
    assert listed.query == [("status", "running"), ("label", "a=1 2"), ("label", "b=x=y&")]
    assert "content-length" not in listed.headers


async def test_a_path_before_the_api_and_a_unix_socket_are_addresses(tmp_path: Path) -> None:
    async with serving() as server, serving(f"{tmp_path}/s") as local:
        server.routes["GET /proxy/healthz"] = local.routes["GET /healthz"] = answer({"status": "ok"}, 503)
        for base in (f"{server.base_url}/proxy/", local.base_url):
            assert (await ask(base, lambda client: client.healthz())).status == "ok"
    assert local.requests[0].headers["host"] == "localhost"


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([])
        assert await ask(server.base_url, list_vms) == []


async def test_headers_that_come_twice_are_joined() -> None:
    async with serving() as server:
        head = b"Content-Length: 2\r\nVolant-Event-Id: a\r\nvolant-event-id: b\r\n\r\n"
        server.routes["GET /api/v1/vms"] = sends(OK, head, BODY)
        assert await ask(server.base_url, lambda client: client.newest_event()) == "a, b"


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(break_off, id="nothing"),
        pytest.param(sends(OK[:5]), id="half a line"),
        pytest.param(sends(OK, b"Content-Length: 9\r\n\r\n["), id="half a body"),
        pytest.param(sends(OK, b"Transfer-Encoding: chunked\r\n\r\n9\r\n["), id="half a chunk"),
        pytest.param(sends(OK, b"Transfer-Encoding: chunked\r\n\r\nx\r\n"), id="no chunk"),
        pytest.param(sends(OK, b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]"), id="two lengths"),
        pytest.param(sends(OK, b"Content-Length: -1\r\n\r\n[]"), id="a negative length"),
        pytest.param(sends(b"SSH-2.0-OpenSSH_10.0\r\n"), id="another protocol"),
        pytest.param(sends(b"\x00\xff" * 1000), id="no protocol"),
        pytest.param(sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), id="an upgrade"),
        pytest.param(sends(OK, b"X: " + b"x" * 200_000 + b"\r\n\r\n[]"), id="a long header"),
        pytest.param(sends(OK, *[b"X: x\r\n" * 1000] * 200), id="many headers"),
        pytest.param(sends(OK, b"Content-Length: 3\r\n\r\n[}]"), id="no JSON"),
        pytest.param(sends(OK, b"Content-Length: 4\r\n\r\n[{}]"), id="another type"),
        pytest.param(sends(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"), id="a redirect"),
        pytest.param(sends(b"HTTP/1.1 204 No Content\r\n\r\n"), id="no content"),
        pytest.param(sends(b"HTTP/1.1 502 Bad Gateway\r\nX-Request-Id: r\r\n\r\n<html>"), id="an error of a proxy"),
        pytest.param(sends(b'HTTP/1.1 500 Error\r\n\r\n{"detail":"\xff"}'), id="an error that is no UTF-8"),
        pytest.param(sends(b"HTTP/1.1 500 Error\r\n\r\n", *[b"x" * 65536] * 17), id="a long error"),
        pytest.param(problem(404, "vm-not-found", "there is none", field="name", hint="h", vm="v"), id="an error"),
    ],
)
async def test_both_transports_say_the_same_of_an_answer(handler: Handler) -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes["GET /api/v1/vms"] = handler
        with pytest.raises((ClientError, ClientProblem)) as expected:
            await client.vms.list()
        with pytest.raises((ClientError, ClientProblem)) as found:
            await ask(server.base_url, list_vms)
    assert facts(found.value) == facts(expected.value)


def facts(error: BaseException) -> dict[str, object]:
    """Returns what people and programs see of an error."""
    return {"type": type(error), "text": str(error), **vars(error)}


@pytest.mark.parametrize("base", ["http://127.0.0.1:{port}", "http://localhost:{port}", "unix:{path}/none"])
async def test_both_transports_say_the_same_when_nobody_is_there(base: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = base.format(port=taken.getsockname()[1], path=tmp_path)
        async with Client(address) as client:
            with pytest.raises(Unreachable) as expected:
                await client.healthz()
        with pytest.raises(Unreachable) as found:
            await ask(address, lambda client: client.healthz())
    assert facts(found.value) == facts(expected.value)


async def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    for host in ("volant.invalid", "a..b", "x" * 70):
        with pytest.raises(Unreachable, match=host):
            await ask(f"http://{host}:7777", list_vms)


async def test_an_answer_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plain, "MAX_BODY", 1000)
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = sends(OK, b"\r\n", b" " * 1001)
        with pytest.raises(UnexpectedAnswer, match="longer than 1000 bytes"):
            await ask(server.base_url, list_vms)


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 1", OK + b"\r\n[", b"HTTP/1.1 500 Error\r\n\r\n{", None])
async def test_a_slow_answer_ends_at_the_deadline(begins: bytes | None) -> None:
    async def drip(request: Request, stream: trio.abc.Stream) -> None:
        del request
        while True:
            # Each piece comes in time, and the whole never does.
            await stream.send_all(begins or b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await trio.sleep(0.01)

    async with serving() as server:
        slow = _transport.Request("GET", "/slow")
        server.routes["GET /slow"] = drip if begins is None else holds(begins)
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
            await ask(server.base_url, lambda client: client._transport.send(slow, timeout_s=0.2))


def holds(begins: bytes) -> Handler:
    """Returns a handler that sends this and then a blank now and then."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        if not begins:
            await trio.sleep_forever()
        await stream.send_all(begins)
        while True:
            await stream.send_all(b" ")
            await trio.sleep(0.01)

    return handler


async def test_a_request_that_nobody_reads_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        big = _transport.Request("POST", "/x", body={"name": "p", "description": "x" * 30_000_000})
        with pytest.raises(DeadlineExceeded):
            await ask(base, lambda client: client._transport.send(big, timeout_s=0.2))


async def test_an_answer_before_the_request_was_read_is_the_answer() -> None:
    """A daemon that refuses a large body does not wait for its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 20):
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, refuse)
            big = {"name": "x" * 10_000_000}
            with pytest.raises(ClientProblem, match="413"):
                await ask(base, lambda client: client._transport.send(_transport.Request("POST", "/x", body=big)))


async def test_all_requests_of_a_client_may_have_one_deadline() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = stay_silent

        async def twice(client: Requests) -> None:
            for _ in range(2):
                with pytest.raises(ClientError):
                    await client.vms.list()

        # Each request has 30 s of its own.
        with trio.fail_after(20):
            await ask(server.base_url, twice, within_s=0.2)


async def test_a_queue_of_a_unix_socket_that_is_full_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{tmp_path}/s")
            with pytest.raises(Unreachable, match="no connection within"):
                await ask(f"unix:{tmp_path}/s", list_vms, within_s=0.3)


async def test_a_change_is_sent_again_under_its_key_when_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_transport, "_AGAIN_PAUSE_S", 0.01)
    async with serving() as server:
        busy = problem(409, "idempotency-key-in-use", "under way")
        server.routes["POST /api/v1/vms/demo/start"] = [break_off, busy, break_off, answer(vm())]
        await ask(server.base_url, lambda client: client.vms.start("demo"))
        assert len({request.head for request in server.requests}) == 1
        assert len(server.requests) == 4
        monkeypatch.setattr(_transport, "_AGAIN_S", 0.1)
        server.routes["POST /api/v1/vms/demo/start"] = break_off
        with pytest.raises(ConnectionLost):
            await ask(server.base_url, lambda client: client.vms.start("demo"))
        with pytest.raises(Problem, match="visible ASCII"):
            await ask(server.base_url, lambda client: client.vms.start("demo", idempotency_key="two words"))


async def test_an_answer_that_is_compressed_unasked_is_not_understood() -> None:
    async with serving() as server:

        async def compressed(request: Request, stream: trio.abc.Stream) -> None:
            assert request.headers["accept-encoding"] == "identity"
            await send_head(stream, 200, Content_Encoding="gzip")
            await stream.send_all(gzip.compress(b"[]"))

        server.routes["GET /api/v1/vms"] = compressed
        with pytest.raises(UnexpectedAnswer, match="GET /api/v1/vms"):
            await ask(server.base_url, list_vms)


@pytest.mark.parametrize("key", ["", "two words", "ä", "line\nbreak", "x" * 1001])
def test_what_can_be_no_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="the API key is not") as refused:
        PlainClient("http://127.0.0.1:1", api_key=key)
    assert not key or key not in str(refused.value)


def test_what_waits_for_an_event_loop_is_an_error() -> None:
    class Once:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def wait() -> None:
        await Once()

    async def value() -> int:
        return 7

    assert run_plain(value()) == 7
    with pytest.raises(RuntimeError, match="wait waits for something"):
        run_plain(wait())


@pytest.mark.programs
async def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    await trio.run_process(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        capture_stderr=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1")
    listener: Any = listeners[0].transport_listener
    port = listener.socket.getsockname()[1]
    server = Server(f"https://localhost:{port}", {"GET /api/v1/vms": answer([])})

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            await server.serve(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        async with Client(server.base_url) as client:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED") as expected:
                await client.vms.list()
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED") as found:
            await ask(server.base_url, list_vms)
        assert facts(found.value) == facts(expected.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await ask(server.base_url, list_vms) == []
        with pytest.raises(Unreachable, match="IP address mismatch"):
            await ask(f"https://127.0.0.1:{port}", list_vms)
        nursery.cancel_scope.cancel()


async def test_a_server_that_says_nothing_to_tls_is_unreachable() -> None:
    async with serving() as server:
        with pytest.raises(Unreachable, match="no connection within"):
            await ask(server.base_url.replace("http:", "https:"), list_vms, within_s=0.3)


@pytest.mark.parametrize("given", ["..", ".", "", "a\udcff"])
async def test_what_can_not_be_sent_is_refused_as_on_trio(given: str) -> None:
    calls: list[Call] = [lambda client: client.vms.list(labels={"a": f"{given}\udcff"})]
    if given != "a\udcff":
        calls.append(lambda client: client.templates.delete(given))
    async with serving() as server:
        for call in calls:
            with pytest.raises(Problem) as refused:
                await ask(server.base_url, call)
            assert refused.value.status == 400
        assert server.requests == []


async def test_any_text_can_be_a_prefix_of_the_path() -> None:
    async with serving() as server:
        server.routes["GET /a%20b/%C3%BC/c%2Fd/api/v1/vms"] = answer([vm()])
        base = f"{server.base_url}/a b/ü/c%2Fd/"
        assert [each.name for each in await ask(base, list_vms)] == ["demo"]
        async with Client(base) as client:
            assert [each.name for each in await client.vms.list()] == ["demo"]
