"""TLS of the server: what it speaks, that hostile handshakes harm nobody, and that credentials are replaced."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.api.kit import FAST, Answer, Running, bare, read_answer, read_to_end, request, until
from tests.certificates import Authority
from volant.http import Credentials, Limits, Tls, serve, server_context

WITHIN_S = 20.0


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the scheme and the names of the client's certificate; `/echo` with the body."""
    body = b""
    while scope["type"] == "http":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    certificate = scope["state"].get("certificate")
    said = {"scheme": scope["scheme"], "names": None if certificate is None else certificate.names}
    content = body if scope["path"] == "/echo" else msgspec.json.encode(said)
    fields = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": content, "more_body": False})


def credentials(certificate: Path, *authorities: Authority) -> Credentials:
    pem = "".join(authority.path.read_text() for authority in authorities)
    context = server_context(certificate, None, pem)
    return Credentials(context, frozenset(context.get_ca_certs(binary_form=True)))


class Secured(Running):
    """A server with TLS."""

    tls: Tls
    authority: Authority
    opened: list[trio.SocketStream]

    async def connect(self) -> trio.SocketStream:
        stream = await super().connect()
        self.opened.append(stream)
        return stream

    async def open(self, context: ssl.SSLContext | None = None) -> trio.SSLStream[trio.SocketStream]:
        stream = trio.SSLStream(
            await self.connect(), context or self.authority.client_context(), server_hostname="127.0.0.1"
        )
        with trio.fail_after(WITHIN_S):
            await stream.do_handshake()
        return stream

    async def fetch(self, path: str = "/", context: ssl.SSLContext | None = None) -> Answer:
        stream = await self.open(context)
        try:
            return await ask(stream, path)
        finally:
            await trio.aclose_forcefully(stream)


async def ask(stream: trio.SSLStream[trio.SocketStream], path: str = "/", body: bytes | None = None) -> Answer:
    with trio.fail_after(WITHIN_S):
        await stream.send_all(request("GET" if body is None else "POST", path, body))
        return await read_answer(stream, within_s=WITHIN_S)


def said(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(answer.body)
    return found


@asynccontextmanager
async def secured(
    path: Path,
    limits: Limits = FAST,
    *,
    clients: Authority | None = None,
    required: bool = False,
    app: Callable[..., Any] = hello,
) -> AsyncIterator[Secured]:
    authority = Authority(path)
    own = credentials(authority.issue("localhost"), *([clients] if clients else []))
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = Secured(listener.getsockname()[1], trio.Event(), trio.Event())
        server.tls, server.authority, server.opened = Tls(own, lambda: required), authority, []
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve(
                    bare(app), [listener], stopping=server.stopping, limits=limits, tls=server.tls,
                    task_status=task_status,
                )  # fmt: skip

            await nursery.start(run)
            yield server
            for stream in server.opened:
                await trio.aclose_forcefully(stream)
            server.stopping.set()


async def test_requests_are_served_over_tls(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        stream = await server.open()
        for _ in range(3):
            assert said(await ask(stream)) == {"scheme": "https", "names": None}
        large = bytes(range(256)) * 4096
        assert (await ask(stream, "/echo", large)).body == large
        assert stream.selected_alpn_protocol() is None
        # The client ends its direction, and gets the server's end.
        with trio.fail_after(WITHIN_S):
            await stream.unwrap()


async def test_a_request_that_comes_with_the_end_of_the_handshake_is_served(tmp_path: Path) -> None:
    """As clients of TLS 1.3 do: they need not wait for the server's last word."""
    async with secured(tmp_path) as server:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = server.authority.client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        async with await server.connect() as stream:
            with trio.fail_after(WITHIN_S):
                while True:
                    try:
                        client.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        await stream.send_all(outgoing.read())
                        incoming.write(await stream.receive_some(65536))
                client.write(request("GET", "/"))
                await stream.send_all(outgoing.read())
                while True:
                    try:
                        assert client.read(65536).startswith(b"HTTP/1.1 200 ")
                        break
                    except ssl.SSLWantReadError:
                        incoming.write(await stream.receive_some(65536))


async def test_only_http_1_1_is_offered(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        context = server.authority.client_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        assert (await server.open(context)).selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_both_versions_encrypt_with_authentication_and_forward_secrecy(
    tmp_path: Path, version: ssl.TLSVersion
) -> None:
    async with secured(tmp_path) as server:
        context = server.authority.client_context()
        context.minimum_version = context.maximum_version = version
        stream = await server.open(context)
        assert stream.version() == version.name.replace("_", ".")
        name = str(stream.cipher()[0])
        assert "GCM" in name or "CHACHA20" in name
        assert said(await ask(stream))["scheme"] == "https"


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA256", "DHE-RSA-AES128-GCM-SHA256"])
async def test_other_ciphers_are_refused(tmp_path: Path, cipher: str) -> None:
    async with secured(tmp_path) as server:
        context = server.authority.client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(cipher)
        with pytest.raises(trio.BrokenResourceError):
            await server.open(context)


async def test_plain_http_gets_a_short_answer(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        async with await server.connect() as stream:
            await stream.send_all(request("GET", "/"))
            answer = await read_answer(stream)
            assert (answer.status, answer.body) == (
                400, b"This port expects TLS: use https:// instead of http://.\n"
            )  # fmt: skip
            assert await read_to_end(stream) == b""
        assert said(await server.fetch())["scheme"] == "https"


async def test_bytes_that_are_no_handshake_end_only_their_connection(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        for data in (b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"a" * 100, b"\x16\x03\x01\0\x05hello", b"SSH-2.0-x\r\n"):
            async with await server.connect() as stream:
                await stream.send_all(data)
                await stream.send_eof()
                await read_to_end(stream)
        assert said(await server.fetch())["scheme"] == "https"


async def test_a_garbled_record_ends_only_its_connection(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        stream = await server.open()
        await ask(stream)
        await stream.transport_stream.send_all(b"\x17\x03\x03\0\x20" + b"x" * 32)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(stream)
        assert said(await server.fetch())["scheme"] == "https"


async def test_a_handshake_has_a_deadline(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(FAST, handshake_s=0.3)
    async with secured(tmp_path, limits) as server:
        async with await server.connect() as silent, await server.connect() as half:
            await half.send_all(b"\x16\x03\x01\x02\0\x01")
            for stream in (silent, half):
                with trio.fail_after(WITHIN_S):
                    assert await stream.receive_some(100) == b""


async def test_of_too_many_handshakes_the_oldest_is_cut(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(FAST, handshake_s=60.0, handshakes=20)
    async with secured(tmp_path, limits) as server:
        kept = await server.open()
        half = [await server.connect() for _ in range(60)]
        # Those that are left wait, and neither an open connection nor a new one has to.
        assert (await ask(kept)).status == 200
        assert (await server.fetch()).status == 200
        with trio.fail_after(WITHIN_S), pytest.raises(trio.BrokenResourceError):
            await half[0].receive_some(1)
        with trio.move_on_after(0.1):
            assert not await half[-1].receive_some(1), "it is not among the oldest"
            raise AssertionError("it is not among the oldest")


async def test_a_stop_waits_for_no_handshake(tmp_path: Path) -> None:
    async with secured(tmp_path, msgspec.structs.replace(FAST, handshake_s=60.0)) as server:
        stream = await server.connect()
        await stream.send_all(b"\x16\x03\x01\x02\0\x01")
        assert (await server.fetch()).status == 200
        server.stopping.set()
        with trio.fail_after(WITHIN_S):
            try:
                assert await stream.receive_some(100) == b""
            except trio.BrokenResourceError:
                pass


async def test_a_half_close_still_gets_the_answer(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        stream = await server.open()
        await stream.send_all(request("GET", "/"))
        await stream.transport_stream.send_eof()
        assert (await read_answer(stream)).status == 200


async def test_a_renewed_certificate_counts_for_new_connections_and_old_ones_go_on(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        before = await server.open()
        await ask(before)
        first = before._ssl_object.getpeercert(binary_form=True)
        server.tls.replace(credentials(server.authority.issue("localhost")))
        assert (await ask(before)).status == 200
        after = await server.open()
        assert after._ssl_object.getpeercert(binary_form=True) != first


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_is_known_by_its_certificate(tmp_path: Path, version: ssl.TLSVersion) -> None:
    clients = Authority(tmp_path, "clients")
    own = clients.issue("ci", client=True, uris=("spiffe://example/ci",), addresses=())
    async with secured(tmp_path, clients=clients, required=True) as server:
        context = server.authority.client_context(own)
        context.maximum_version = version
        assert said(await server.fetch(context=context))["names"] == ["CN=ci", "DNS=ci", "URI=spiffe://example/ci"]


async def test_a_resumed_session_is_known_too(tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    async with secured(tmp_path, clients=clients, required=True) as server:
        context = server.authority.client_context(clients.issue("ci", client=True))

        def resumed() -> None:
            session = None
            for _ in range(2):
                with (
                    socket.create_connection(("127.0.0.1", server.port), WITHIN_S) as sock,
                    context.wrap_socket(sock, server_hostname="127.0.0.1", session=session) as stream,
                ):
                    stream.sendall(request("GET", "/", None, Connection="close"))
                    answer = b"".join(iter(lambda: stream.recv(65536), b""))
                    assert b"CN=ci" in answer
                    assert stream.session_reused == (session is not None)
                    session = stream.session

        await trio.to_thread.run_sync(resumed)


async def refused(server: Secured, certificate: Path | None) -> None:
    """A client with this certificate gets no answer."""
    with pytest.raises((trio.BrokenResourceError, AssertionError)):
        await server.fetch(context=server.authority.client_context(certificate))


@pytest.mark.parametrize("required", [True, False])
async def test_wrong_certificates_of_clients_are_refused(tmp_path: Path, required: bool) -> None:
    clients, others = Authority(tmp_path, "clients"), Authority(tmp_path, "others")
    async with secured(tmp_path, clients=clients, required=required) as server:
        await refused(server, others.issue("stranger", client=True))
        await refused(server, clients.issue("late", client=True, days=-1))
        await refused(server, clients.issue("server"))
        if required:
            await refused(server, None)
        else:
            assert said(await server.fetch())["names"] is None
        certificate = clients.issue("ci", client=True)
        assert said(await server.fetch(context=server.authority.client_context(certificate)))["names"]


async def test_a_removed_authority_ends_connections_at_once(tmp_path: Path) -> None:
    clients, others = Authority(tmp_path, "clients"), Authority(tmp_path, "others")
    async with secured(tmp_path, clients=clients) as server:
        both = credentials(tmp_path / "localhost.pem", clients, others)
        server.tls.replace(both)
        first = await server.open(server.authority.client_context(clients.issue("ci", client=True)))
        second = await server.open(server.authority.client_context(others.issue("robot", client=True)))
        anonymous = await server.open()
        for stream in (first, second, anonymous):
            assert (await ask(stream)).status == 200
        assert server.tls.replace(credentials(tmp_path / "localhost.pem", others)) == 1
        for stream in (second, anonymous):
            assert (await ask(stream)).status == 200
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await ask(first)
        await until(lambda: len(server.tls._known) == 1)


async def test_a_resumed_session_ends_only_if_one_of_the_authorities_was_removed(tmp_path: Path) -> None:
    """It has no chain, so any of them may have verified it."""
    clients, others = Authority(tmp_path, "clients"), Authority(tmp_path, "others")
    async with secured(tmp_path, clients=clients) as server:
        server.tls.replace(credentials(tmp_path / "localhost.pem", clients, others))
        context = server.authority.client_context(clients.issue("ci", client=True))
        first = await server.open(context)
        await ask(first)
        resumed = trio.SSLStream(await server.connect(), context, server_hostname="127.0.0.1")
        resumed._ssl_object.session = first._ssl_object.session
        assert said(await ask(resumed))["names"]
        assert resumed._ssl_object.session_reused
        assert server.tls.replace(credentials(tmp_path / "localhost.pem", others, clients)) == 0
        assert (await ask(resumed)).status == 200
        assert server.tls.replace(credentials(tmp_path / "localhost.pem", clients)) == 1
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await ask(resumed)
        assert (await ask(first)).status == 200


async def test_a_renewal_under_load_drops_no_connection(tmp_path: Path) -> None:
    async with secured(tmp_path) as server, trio.open_nursery() as nursery:
        answered = 0
        renewed = trio.Event()

        async def load(keep: bool) -> None:
            nonlocal answered
            stream = await server.open()
            while not renewed.is_set():
                assert (await ask(stream)).status == 200
                answered += 1
                if not keep:
                    await trio.aclose_forcefully(stream)
                    stream = await server.open()

        async def more_answers() -> None:
            enough = answered + 10
            await until(lambda: answered > enough)

        for number in range(8):
            nursery.start_soon(load, number % 2 == 0)
        for _ in range(10):
            server.tls.replace(credentials(server.authority.issue("localhost")))
            await more_answers()
        renewed.set()
