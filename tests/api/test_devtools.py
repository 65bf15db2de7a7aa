"""A DevTools client finds the browser in a VM and talks to it, and neither learns of the other what it need not.

The agent is the real one, as in `test_relay`; the browser is the test's, as strict as Chromium is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.api.kit import UPGRADE, Answer, Api, read_head, request, until
from tests.api.test_relay import guest
from volant.api import _devtools
from volant.api._devtools import Place, rewritten
from volant.http import ApiSettings
from volant.http._addresses import parse_network
from volant.http._keys import MAX_TICKETS_OF_ONE, Tickets
from volant.model import Desired, Problem, Status, VmRow

PREFIX = "/ws/v1/vms/tab/devtools"
GUID = "29762a6d-bb2d-4f27-bc20-d7412a2900a2"
PAGE = "55A5A63F0D256B381EE71F12F5783111"
BUNDLED = "devtools://devtools/bundled/inspector.html"
FRONTEND = "https://chrome-devtools-frontend.appspot.com/serve_rev/@a21ce9/inspector.html"
KEY = "k" * 32
MIB = 1024 * 1024


@dataclass
class Browser:
    """What a browser says and hears."""

    port: int = 0
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """First lines and headers of what it was asked."""
    answers: dict[str, Any] = field(default_factory=dict)
    """By path, in the place of its own: JSON, or bytes that are all it says."""
    socket: Callable[[trio.SocketStream, bytes], Awaitable[None]] | None = None
    """What it does with a WebSocket once it is open."""

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                head, rest = await read_head(stream)
                line, *fields = head.decode().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
                self.seen.append((line, headers))
                await self._answer(stream, line, headers, rest)
        except (trio.BrokenResourceError, AssertionError):
            pass

    async def _answer(self, stream: trio.SocketStream, line: str, headers: dict[str, str], rest: bytes) -> None:
        method, target, _ = line.split(" ")
        path = target.partition("?")[0].rstrip("/")
        status, body = 200, self.answers.get(path)
        if headers["host"] != f"localhost:{self.port}":
            status, body = 500, b"Host header is specified and is not an IP address or localhost."
        elif "origin" in headers:
            status, body = 403, b"Rejected an incoming WebSocket connection."
        elif headers.get("upgrade") == "websocket":
            if body is None and path in (f"/devtools/browser/{GUID}", f"/devtools/page/{PAGE}"):
                await self._open(stream, headers["sec-websocket-key"], rest)
                return
            status, body = (404, b"No such target") if body is None else (status, body)
        elif body is None:
            status, body = self._told(method, path)
        if isinstance(body, bytes) and body.startswith(b"HTTP/"):
            await stream.send_all(body)
            await trio.sleep_forever()
        data = body if isinstance(body, bytes) else json.dumps(body, indent=3).encode()
        said = f"HTTP/1.1 {status} Said\r\nContent-Length:{len(data)}\r\nContent-Type:application/json; charset=UTF-8"
        await stream.send_all(f"{said}\r\nSet-Cookie: a=b\r\n\r\n".encode() + data)

    def _told(self, method: str, path: str) -> tuple[int, Any]:
        at = f"127.0.0.1:{self.port}/devtools"
        page = {
            "id": PAGE,
            "type": "page",
            "url": f"http://127.0.0.1:{self.port}/",
            "devtoolsFrontendUrl": f"{FRONTEND}?ws={at}/page/{PAGE}",
            "webSocketDebuggerUrl": f"ws://{at}/page/{PAGE}",
        }
        match method, path:
            case "GET", "/json/version":
                return 200, {"Browser": "Test/1", "webSocketDebuggerUrl": f"ws://{at}/browser/{GUID}"}
            case "GET", "/json" | "/json/list":
                return 200, [page]
            case "PUT", "/json/new":
                return 200, page
            case "GET", "/json/protocol":
                return 200, {"domains": [{"domain": "x" * 100} for _ in range(20_000)]}
            case "GET", path if path in (f"/json/activate/{PAGE}", f"/json/close/{PAGE}"):
                return 200, b"Target is closing"
        return 404, b"No such target id: XX"

    async def _open(self, stream: trio.SocketStream, key: str, rest: bytes) -> None:
        digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
        extensions = "" if self.socket is None else "Sec-WebSocket-Extensions: permessage-deflate\r\n"
        await stream.send_all(
            "HTTP/1.1 101 WebSocket Protocol Handshake\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n{extensions}\r\n".encode()
        )
        if self.socket is not None:
            await self.socket(stream, rest)
        while await stream.receive_some(65536):
            pass


@dataclass
class Tab:
    """A VM called `tab`, of a plugin whose browser listens on a port of its own."""

    api: Api
    browser: Browser

    async def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        return await self.api.server.ask(request(method, f"{PREFIX}{path}", None, **headers))

    async def opened(self, path: str, **headers: str) -> int:
        """Whether a WebSocket opens: 101, or what it is instead."""
        async with await self.api.server.connect() as stream:
            await stream.send_all(request("GET", f"{PREFIX}{path}", None, **{**UPGRADE, **headers}))
            head, _ = await read_head(stream)
            return int(head.split()[1])

    async def told(self, path: str, method: str = "GET", **headers: str) -> Any:
        answer = await self.api.client.request(method, f"{PREFIX}{path}", headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def becomes(self, **fields: Any) -> None:
        """Let its row say something else."""
        projection: Any = self.api.deps.store.projection
        by_id = type(projection).by_id

        def changed(row: VmRow | None) -> VmRow | None:
            return None if row is None else msgspec.structs.replace(row, **fields)

        projection.by_id = lambda vm_id: changed(by_id(projection, vm_id))


@asynccontextmanager
async def tab(
    path: Path, settings: ApiSettings | None = None, *, browser: bool = True, port: int | None = None
) -> AsyncIterator[Tab]:
    """Serves the VM. `port`: where another browser listens."""
    there = Browser()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        there.port = port or listeners[0].socket.getsockname()[1]
        if browser and port is None:
            nursery.start_soon(trio.serve_listeners, there.serve, listeners)
        else:
            await listeners[0].aclose()
        async with guest(path) as at:
            await at.client.post("/api/v1/plugins", json={"name": "browser", "devtools": {"port": there.port}})
            await at.api.crashed("tab", plugin="browser")
            shown = Tab(at.api, there)
            # Its agent answers whatever its row says; it has been running for ever.
            shown.becomes(desired=Desired.STOPPED)
            if settings is not None:
                at.api.access.replace(settings)
            yield shown
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("path", ["/json/version", "/json/version/"])
async def test_the_browser_is_found_at_our_address(tmp_path: Path, path: str) -> None:
    async with tab(tmp_path) as at:
        told = await at.told(path)
        port = at.api.server.port
        assert told == {"Browser": "Test/1", "webSocketDebuggerUrl": f"ws://127.0.0.1:{port}{PREFIX}/browser/{GUID}"}


@pytest.mark.parametrize("path", ["/json", "/json/", "/json/list", "/json/list/"])
async def test_pages_are_found_at_our_address(tmp_path: Path, path: str) -> None:
    async with tab(tmp_path) as at:
        (page,) = await at.told(path)
        socket = f"127.0.0.1:{at.api.server.port}{PREFIX}/page/{PAGE}"
        assert page["webSocketDebuggerUrl"] == f"ws://{socket}"
        assert page["devtoolsFrontendUrl"] == f"{BUNDLED}?ws={socket}"
        assert page["url"] == f"http://127.0.0.1:{at.browser.port}/"


async def test_pages_are_opened_and_closed(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        page = await at.told("/json/new?http%3A%2F%2Fx%2F%3Fapi_key%3D1", "PUT")
        assert at.browser.seen[-1][0] == "PUT /json/new?http%3A%2F%2Fx%2F%3Fapi_key%3D1 HTTP/1.1"
        assert page["webSocketDebuggerUrl"].endswith(f"{PREFIX}/page/{PAGE}")
        for verb in ("activate", "close"):
            answer = await at.api.client.get(f"{PREFIX}/json/{verb}/{PAGE}")
            assert (answer.status_code, answer.text) == (200, "Target is closing")
        answer = await at.api.client.get(f"{PREFIX}/json/close/XX")
        assert (answer.status_code, answer.json()["detail"]) == (
            404,
            "the browser in VM 'tab' answers: No such target id: XX",
        )


async def test_the_protocol_is_the_browsers_own(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        for path in ("/json/protocol", "/json/protocol/"):
            # What some clients send with a GET must not be waited for.
            answer = await at.ask(path, Content_Length="0")
            assert answer.body == json.dumps(at.browser._told("GET", "/json/protocol")[1], indent=3).encode()
            assert answer.headers["content-security-policy"] == "sandbox"


async def test_the_browser_sees_nothing_of_its_client(tmp_path: Path) -> None:
    async with tab(tmp_path, ApiSettings(api_keys=(KEY,), cors_origins=("https://console.example",))) as at:
        said = {
            "X_Volant_API_Key": KEY,
            "Authorization": f"Bearer {KEY}",
            "Cookie": "a=b",
            "Origin": "https://console.example",
        }
        for path in ("/json/version", "/json/protocol"):
            assert (await at.ask(path, **said)).status == 200
        assert (await at.ask(f"/json/new?about:blank&api_key={KEY}", "PUT", **said)).status == 200
        for path in ("/browser?ticket=x", f"/page/{PAGE}?x=1&api_key={KEY}"):
            assert await at.opened(path, **said) == 101
        assert {line.split(" ")[1] for line, _ in at.browser.seen} == {
            "/json/version",
            "/json/new?about:blank",
            "/json/protocol",
            f"/devtools/browser/{GUID}",
            f"/devtools/page/{PAGE}?x=1",
        }
        for _, seen in at.browser.seen:
            assert seen["host"] == f"localhost:{at.browser.port}"
            assert not seen.keys() & {"origin", "cookie", "authorization", "x-volant-api-key"}


async def test_a_browsers_answer_never_runs_with_our_origin(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        for path in ("/json/version", "/json/list", "/json/protocol", f"/json/close/{PAGE}"):
            answer = await at.ask(path)
            assert answer.headers["content-security-policy"] == "sandbox"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "set-cookie" not in answer.headers
        answer = await at.ask("/page/XX", **UPGRADE)
        assert (answer.status, answer.body) == (404, b"No such target")
        assert answer.headers["content-security-policy"] == "sandbox"
        assert "set-cookie" not in answer.headers


# Addresses


async def test_addresses_are_those_that_the_client_has_reached_us_by(tmp_path: Path) -> None:
    settings = ApiSettings(allowed_hosts=("volant.example",), trusted_proxies=(parse_network("127.0.0.1"),))
    async with tab(tmp_path, settings) as at:
        for host, proto, scheme in (
            ("volant.example", "https", "wss"),
            ("Volant.Example:8443", "https, http", "wss"),
            ("volant.example:8080", "http", "ws"),
            ("[::1]:7777", "gopher", "ws"),
            ("localhost", "", "ws"),
        ):
            body = (await at.ask("/json/list", Host=host, X_Forwarded_Proto=proto, X_Forwarded_Host="evil")).body
            (page,) = json.loads(body)
            assert page["webSocketDebuggerUrl"] == f"{scheme}://{host.lower()}{PREFIX}/page/{PAGE}"
            assert page["devtoolsFrontendUrl"] == f"{BUNDLED}?{scheme}={host.lower()}{PREFIX}/page/{PAGE}"
        assert (await at.ask("/json/list", Host="evil.example")).status == 421


async def test_only_a_trusted_proxy_sets_the_scheme(tmp_path: Path) -> None:
    async with tab(tmp_path, ApiSettings(trusted_proxies=(parse_network("192.0.2.1"),))) as at:
        answer = await at.ask("/json/version", X_Forwarded_Proto="https")
        assert json.loads(answer.body)["webSocketDebuggerUrl"].startswith("ws://127.0.0.1/")


@pytest.mark.parametrize(
    "socket",
    [
        "ws://evil.example/page/1",
        "http://localhost:9222/devtools/page/1",
        "ws://localhost:9222/devtools/page/../../x",
        "ws://localhost:9222/devtools/page/1?x",
        "ws://localhost:9222/devtools/page/1\nx",
        "ws://localhost:9222/devtools/other/1",
        "",
        None,
        7,
    ],
)
def test_an_address_without_an_equivalent_is_removed(socket: object) -> None:
    told = {"id": "1", "webSocketDebuggerUrl": socket, "devtoolsFrontendUrl": f"/devtools/inspector.html?ws={socket}"}
    assert rewritten([told, 3], Place(False, "h/d")) == [{"id": "1"}, 3]


@pytest.mark.parametrize(
    "frontend",
    [
        "/devtools/inspector.html?ws=localhost:9222/devtools/page/1",
        "javascript:alert(1)?ws=localhost:9222/devtools/page/1",
        "https://evil.example/inspector.html?ws=localhost:9222/devtools/page/1",
        f"{FRONTEND}?x=1&ws=localhost:9222/devtools/page/1&panel=y",
    ],
)
def test_no_guest_chooses_the_page_that_shows_its_browser(frontend: str) -> None:
    said = {"devtoolsFrontendUrl": frontend, "devtoolsFrontendUrlCompat": frontend, "id": "1"}
    shown = f"{BUNDLED}?wss=[::1]:1/d/page/1%3Fticket%3Dt"
    assert rewritten(said, Place(True, "[::1]:1/d", lambda: "t")) == {"id": "1", "devtoolsFrontendUrl": shown}


def test_a_long_address_is_not_searched() -> None:
    """A guest chooses it, and the event loop would read it."""
    path = "/devtools/page/1"
    for url in (f"ws://{'h' * 2048}{path}", f"{FRONTEND}?ws=localhost{path}&x={'x' * 2048}"):
        said = {"id": "1", "webSocketDebuggerUrl": url, "devtoolsFrontendUrl": url}
        assert rewritten(said, Place(False, "h/d")) == {"id": "1"}


# Keys


async def test_with_a_key_addresses_carry_a_ticket_for_one_use(tmp_path: Path) -> None:
    async with tab(tmp_path, ApiSettings(api_keys=(KEY,))) as at:
        at.api.client.headers["X-Volant-API-Key"] = KEY
        told = await at.told("/json/version")
        assert KEY not in json.dumps(told)
        path = told["webSocketDebuggerUrl"].partition(PREFIX)[2]
        assert [await at.opened(path) for _ in range(2)] == [101, 401]
        (page,) = await at.told("/json/list")
        ticket = re.search(r"\?ticket=([\w-]+)\Z", page["webSocketDebuggerUrl"])
        assert ticket is not None
        assert page["devtoolsFrontendUrl"].endswith(f"%3Fticket%3D{ticket[1]}")


async def test_clients_that_have_only_a_url_may_put_the_key_into_it(tmp_path: Path) -> None:
    async with tab(tmp_path, ApiSettings(api_keys=(KEY,))) as at:
        for path, method in (
            ("/json/version", "GET"),
            ("/json/list", "GET"),
            ("/json/protocol", "GET"),
            ("/json/new?about:blank", "PUT"),
            (f"/json/close/{PAGE}", "GET"),
        ):
            query = f"{'&' if '?' in path else '?'}api_key="
            assert (await at.ask(path, method)).status == 401
            assert (await at.ask(f"{path}{query}wrong", method)).status == 401
            assert (await at.ask(f"{path}{query}{KEY}", method)).status == 200


async def test_a_guest_with_many_pages_uses_up_no_tickets_of_others(tmp_path: Path) -> None:
    async with tab(tmp_path, ApiSettings(api_keys=(KEY,))) as at:
        at.api.client.headers["X-Volant-API-Key"] = KEY
        others = (await at.api.client.post("/api/v1/tickets")).json()["ticket"]
        page = at.browser._told("PUT", "/json/new")[1]
        at.browser.answers["/json/list"] = [page] * 600
        for _ in range(2):
            assert len(await at.told("/json/list")) == 600
        assert (await at.api.client.post("/api/v1/tickets")).status_code == 201
        assert at.api.access.tickets.redeem(others.encode())


async def test_new_tickets_of_a_vm_replace_its_oldest(autojump_clock: trio.testing.MockClock) -> None:
    tickets = Tickets(1000)
    mine = [tickets.issue(1) for _ in range(MAX_TICKETS_OF_ONE + 1)]
    other = tickets.issue(2)
    assert not tickets.redeem(mine[0].encode())
    assert tickets.redeem(mine[1].encode())
    assert tickets.redeem(mine[-1].encode())
    await trio.sleep(61)
    assert not tickets.redeem(other.encode())
    assert tickets.redeem(tickets.issue(3).encode())
    assert set(tickets._of) == {3}


# WebSockets


async def test_the_alias_leads_to_the_browsers_own_websocket(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        for path in ("/browser", f"/browser/{GUID}", f"/devtools/browser/{GUID}", f"/page/{PAGE}"):
            assert await at.opened(path) == 101
            own = f"/browser/{GUID}" if "browser" in path else path
            assert at.browser.seen[-1][0] == f"GET /devtools{own} HTTP/1.1"
        at.browser.answers["/json/version"] = {"webSocketDebuggerUrl": "ws://evil.example/"}
        answer = await at.ask("/browser", **UPGRADE)
        assert (answer.status, "does not report the address" in json.loads(answer.body)["detail"]) == (502, True)


async def test_a_websocket_passes_byte_for_byte_however_long_its_messages_are(tmp_path: Path) -> None:
    down = b"\xc1\x7f" + (20 * MIB).to_bytes(8, "big") + bytes(range(256)) * (20 * MIB // 256)
    up = b"\x81\xff" + (20 * MIB).to_bytes(8, "big") + b"mask" + down[10:]
    digests: list[str] = []

    async def take(stream: trio.SocketStream, size: int) -> str:
        digest = hashlib.sha256()
        while size and (data := await stream.receive_some(min(size, 65536))):
            digest.update(data)
            size -= len(data)
        return digest.hexdigest()

    async def both_ways(stream: trio.SocketStream, rest: bytes) -> None:
        assert not rest
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, down)
            digests.append(await take(stream, len(up)))

    async with tab(tmp_path) as at:
        at.browser.socket = both_ways
        async with await at.api.server.connect() as stream:
            offer = {**UPGRADE, "Sec_WebSocket_Extensions": "permessage-deflate; client_max_window_bits"}
            await stream.send_all(request("GET", f"{PREFIX}/browser/{GUID}", None, **offer))
            # What follows the head of the answer may come with it, and the browser begins to talk at once.
            head = await only_head(stream)
            assert b"sec-websocket-extensions: permessage-deflate\r\n" in head.lower()
            assert at.browser.seen[-1][1]["sec-websocket-extensions"] == offer["Sec_WebSocket_Extensions"]
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, up)
                    digests.append(await take(stream, len(down)))
                await until(lambda: len(digests) == 2)
        assert set(digests) == {hashlib.sha256(data).hexdigest() for data in (up, down)}


async def head_of(stream: trio.SocketStream, path: str = f"/browser/{GUID}") -> bytes:
    """Open a WebSocket; the head of the answer."""
    await stream.send_all(request("GET", f"{PREFIX}{path}", None, **UPGRADE))
    return await only_head(stream)


async def only_head(stream: trio.SocketStream) -> bytes:
    """The head of an answer, and nothing that follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await stream.receive_some(1)
    return head


async def test_an_endless_frame_is_not_buffered_and_a_client_that_leaves_within_one_is_noticed(tmp_path: Path) -> None:
    claim = ((1 << 62) + 7).to_bytes(8, "big")
    got = 0
    left = trio.Event()

    async def pour(stream: trio.SocketStream, rest: bytes) -> None:
        nonlocal got
        await stream.send_all(b"\x01\x7f" + claim + bytes(MIB))
        try:
            while data := await stream.receive_some(65536):
                got += len(data)
        except trio.BrokenResourceError:
            pass
        left.set()

    async with tab(tmp_path) as at:
        at.browser.socket = pour
        async with await at.api.server.connect() as stream:
            assert (await head_of(stream)).startswith(b"HTTP/1.1 101")
            await stream.send_all(b"\x01\xff" + claim + b"mask" + bytes(MIB))
            size = 0
            with trio.fail_after(30):
                while size < 10 + MIB:
                    size += len(await stream.receive_some(65536))
                # All of it is there, and none of it was waited for.
                await until(lambda: got == 14 + MIB)
        with trio.fail_after(30):
            await left.wait()


async def test_an_endless_frame_does_not_delay_the_daemons_stop(tmp_path: Path) -> None:
    async def begin(stream: trio.SocketStream, rest: bytes) -> None:
        await stream.send_all(b"\x81\x7f" + bytes(7))

    async with tab(tmp_path) as at:
        at.browser.socket = begin
        async with await at.api.server.connect() as stream:
            await head_of(stream)
            with trio.fail_after(10):
                assert await stream.receive_some(100)
            await at.api.server.stop()


async def test_a_guest_that_dies_within_a_frame_ends_only_its_websocket(tmp_path: Path) -> None:
    async def die(stream: trio.SocketStream, rest: bytes) -> None:
        await stream.send_all(b"\x81\x7e\xff\xff" + bytes(1000))
        if not at.browser.seen[-1][0].startswith(f"GET /devtools/page/{PAGE} "):
            await stream.aclose()
            raise trio.BrokenResourceError
        await trio.sleep_forever()

    async with tab(tmp_path) as at:
        at.browser.socket = die
        async with await at.api.server.connect() as other, await at.api.server.connect() as stream:
            await head_of(other, f"/page/{PAGE}")
            await head_of(stream)
            size = 0
            with trio.fail_after(10):
                while data := await stream.receive_some(65536):
                    size += len(data)
            # Half a frame, and then the end: nothing is put in the place of what is missing.
            assert size == 1004
            with trio.fail_after(10):
                assert await other.receive_some(65536)
            assert (await at.ask("/json/list")).status == 200


# What is not there


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "", 404),
        ("GET", "/", 404),
        ("GET", "/inspector.html", 404),
        ("GET", "/json/x", 404),
        ("GET", "/json/close/", 404),
        ("GET", "/json/close/a%2F..%2Fb", 404),
        ("GET", "/json/version%0aX", 404),
        ("GET", "/json/new", 405),
        ("GET", "/json%2Fnew", 404),
        ("GET", "/json%2fnew/", 404),
        ("PUT", "/json/list", 405),
        ("POST", "/json/list", 405),
        ("GET", "/browser", 426),
        ("GET", f"/page/{PAGE}", 426),
    ],
)
async def test_nothing_else_of_the_browser_is_reached(tmp_path: Path, method: str, path: str, status: int) -> None:
    async with tab(tmp_path) as at:
        answer = await at.ask(path, method)
        assert answer.status == status
        assert json.loads(answer.body)["hint"]
        if status == 405:
            assert answer.headers["allow"] == ("PUT" if path == "/json/new" else "GET")
        assert not at.browser.seen


async def test_what_is_no_websocket_is_404(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        for path in ("", "/json/version", "/worker/1", f"/page/{PAGE}/x", "/page/a%20b"):
            assert (await at.ask(path, **UPGRADE)).status == 404


async def test_an_error_names_its_cause(tmp_path: Path) -> None:
    async with tab(tmp_path, browser=False) as at:
        for path, headers in (("/json/version", {}), ("/json/protocol", {}), ("/browser", UPGRADE)):
            answer = await at.ask(path, **headers)
            problem = json.loads(answer.body)
            assert (answer.status, problem["vm"]) == (502, "tab")
            assert problem["detail"] == f"no browser listens on port {at.browser.port} in VM 'tab'"
            assert "devtools.port" in problem["hint"]
        answer = await at.api.server.get("/ws/v1/vms/nobody/devtools/json/version")
        assert answer.status == 404

        def stopped(name: str) -> Any:
            raise Problem(409, "vm-not-running", "it is stopped", vm=name)

        at.api.reach(stopped)
        for headers in ({}, UPGRADE):
            assert (await at.ask("/browser" if headers else "/json/list", **headers)).status == 409


async def test_the_default_port_is_9222(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guest(tmp_path) as at:
        monkeypatch.setattr(at.api.deps.store.projection, "by_id", lambda _: None)
        answer = await at.client.get("/ws/v1/vms/demo/devtools/json/version")
        assert answer.json()["detail"] == "no browser listens on port 9222 in VM 'demo'"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"' + b"x" * (5 * MIB) + b'"', "more than"),
        (b"[" + b"{}," * 1_000 + b"{}]", "more than 1000 pages"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", "within"),
        (b"HTTP/1.1 200 OK\r\nX", "within"),
        (b"HTTP/1.1 nonsense\r\n\r\n", "does not answer"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nwhy?", "answers with 500: why?"),
        (b"HTTP/1.1 302 There\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n", "answers with 302"),
        (b"HTTP/1.1 101 Up\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "does not answer"),
    ],
)
async def test_a_malformed_answer_of_a_browser_is_a_502(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, told: str
) -> None:
    monkeypatch.setattr(_devtools, "_ANSWER_S", 0.5)
    async with tab(tmp_path) as at:
        at.browser.answers["/json/version"] = said
        answer = await at.api.client.get(f"{PREFIX}/json/version")
        assert answer.status_code == 502
        assert told in answer.json()["detail"]
        assert (await at.ask("/browser", **UPGRADE)).status == 502
        assert (await at.ask("/json/list")).status == 200


@pytest.mark.parametrize("path", ["/json/protocol", f"/browser/{GUID}", f"/page/{PAGE}"])
async def test_a_guest_sends_no_client_elsewhere(tmp_path: Path, path: str) -> None:
    # Puppeteer and Playwright follow redirections of WebSockets, with the key in their headers.
    async with tab(tmp_path, ApiSettings(api_keys=(KEY,))) as at:
        to = b"HTTP/1.1 %s There\r\nLocation: ws://evil.example/\r\nContent-Length: 0\r\n\r\n"
        headers = {"X_Volant_API_Key": KEY, **(UPGRADE if "json" not in path else {})}
        for status in (b"301", b"302", b"307", b"308", b"401"):
            at.browser.answers[path if "json" in path else f"/devtools{path}"] = to % status
            answer = await at.ask(path, **headers)
            assert answer.status == (401 if status == b"401" and "json" not in path else 502)
            assert "location" not in answer.headers


async def test_answers_of_one_vm_that_are_read_at_once_are_limited(tmp_path: Path) -> None:
    async with tab(tmp_path) as at:
        at.browser.answers["/json/list"] = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(partial(at.ask, "/json/list"))
            await until(lambda: len(at.browser.seen) == _devtools._ANSWERS_AT_ONCE)
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.3):
                await at.ask("/json/version")
            assert len(at.browser.seen) == _devtools._ANSWERS_AT_ONCE
            nursery.cancel_scope.cancel()
        # Those whose clients have left give their places back.
        await at.told("/json/version")


# Waiting


async def test_a_request_waits_for_a_vm_that_is_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tab(tmp_path) as at:
        waiting, runs = trio.Event(), trio.Event()

        async def wait(vm_id: int, states: set[Status], timeout_s: float) -> None:
            assert states == {Status.RUNNING}
            assert 59 < timeout_s <= 60
            waiting.set()
            await runs.wait()

        monkeypatch.setattr(at.api.deps.vms, "wait", wait)
        at.becomes(status=Status.STARTING, desired=Desired.RUNNING)
        for path, headers, status in (("/json/version", {}, b"200"), ("/browser", UPGRADE, b"101")):
            waiting, runs = trio.Event(), trio.Event()
            stream = await at.api.server.connect()
            await stream.send_all(request("GET", f"{PREFIX}{path}", None, **headers))
            with trio.fail_after(10):
                await waiting.wait()
            runs.set()
            head, _ = await read_head(stream)
            assert head.split()[1] == status
            await trio.aclose_forcefully(stream)


async def test_a_request_waits_for_the_browser_of_a_vm_that_has_just_started(tmp_path: Path) -> None:
    async with tab(tmp_path, browser=False) as at, trio.open_nursery() as nursery:
        at.becomes(status=Status.RUNNING, updated_at=at.api.deps.host.clock.now())
        told: list[Any] = []

        async def ask() -> None:
            told.append(await at.told("/json/version"))

        nursery.start_soon(ask)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.5):
            await at.ask("/json/list")
        assert not told
        listeners = await trio.open_tcp_listeners(at.browser.port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, at.browser.serve, listeners)
        await until(lambda: bool(told))
        nursery.cancel_scope.cancel()


async def test_no_request_waits_longer_than_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devtools, "WAIT_S", 0.5)
    async with tab(tmp_path, browser=False) as at:
        at.becomes(status=Status.RUNNING, updated_at=at.api.deps.host.clock.now())
        assert (await at.ask("/json/list")).status == 502


async def test_a_client_that_leaves_and_a_daemon_that_stops_end_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tab(tmp_path) as at:
        waiting, left = trio.Event(), trio.Event()

        async def wait(vm_id: int, states: set[Status], timeout_s: float) -> None:
            waiting.set()
            try:
                await trio.sleep_forever()
            finally:
                left.set()

        monkeypatch.setattr(at.api.deps.vms, "wait", wait)
        at.becomes(status=Status.STARTING, desired=Desired.RUNNING)
        for path, headers in (("/json/version", {}), ("/browser", UPGRADE)):
            waiting, left = trio.Event(), trio.Event()
            stream = await at.api.server.connect()
            await stream.send_all(request("GET", f"{PREFIX}{path}", None, **headers))
            with trio.fail_after(10):
                await waiting.wait()
            await trio.aclose_forcefully(stream)
            with trio.fail_after(10):
                await left.wait()
        stream = await at.api.server.connect()
        waiting = trio.Event()
        await stream.send_all(request("GET", f"{PREFIX}/json/version"))
        with trio.fail_after(10):
            await waiting.wait()
        at.api.server.stopping.set()
        head, _ = await read_head(stream)
        assert head.startswith(b"HTTP/1.1 503")
        await trio.aclose_forcefully(stream)
