"""`/ws/v1/vms/{name}/devtools/*`: the browser in a VM, for clients of the Chrome DevTools Protocol (CDP).

Such a client gets the URLs of the browser's WebSockets over HTTP, then it opens one. `Relay` passes the WebSockets on
as bytes, with messages of any length. The HTTP answers contain addresses inside the guest, so they are decoded, within
limits, and each address is replaced by the daemon's. An address without an equivalent is removed, so that a guest can't
lead a client elsewhere.

A browser listens some seconds after its VM runs, and clients ask only once. So a request waits up to a minute for a VM
that is starting, and for the browser of a VM that has just started. Once a VM has been running for longer, a closed
port is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit
from weakref import WeakValueDictionary

import msgspec
import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff, FairShare
from volant.http import Call, StreamRoute, for_ticket, interruptible, without_credentials
from volant.model import DEVTOOLS_PORT, Desired, Key, Problem, Status, VmRow
from volant.operations import ApiDeps, find_vm, record_access
from volant.relay import SANDBOX, GuestServer, Relay, first_text, to_port

from ._session import moved

WAIT_S = 60.0
"""The time that a request waits for a VM and its browser, and that a browser may take after its VM runs."""
_ANSWER_S = 30.0
_MAX_ANSWER = 4 * 1024 * 1024
"""Maximum size of an HTTP answer. A page's address may be a `data:` URL of 2 MB."""
_MAX_PAGES = 1_000
"""Maximum pages in a list, as each is rewritten and may need a ticket."""
_ANSWERS_AT_ONCE = 4
"""Maximum answers of one VM that are read at once, as each is held in memory."""
_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 1.0

_NEW = re.compile(r"/ws/v1/vms/([^/]*)/devtools/(json/new/?)\Z")
_ROUTE = re.compile(r"/ws/v1/vms/([^/]*)/devtools(?:/(.*))?\Z", re.DOTALL)
_SOCKET = r"(?:browser|page)/[A-Za-z0-9._-]{1,128}"
_SOCKET_PATH = re.compile(rf"(?:devtools/)?({_SOCKET})\Z")
"""The path of a WebSocket. Some clients prepend `/devtools/` to it once more."""
_SOCKET_URL = re.compile(rf"wss?://[^/?#]*/devtools/({_SOCKET})\Z")
_FRONTEND_SOCKET = re.compile(rf"[^/]*/devtools/({_SOCKET})\Z")
_MAX_ADDRESS = 2048
"""Maximum length of an address that a browser reports about itself, in characters."""
_BUNDLED_FRONTEND = "devtools://devtools/bundled/inspector.html"
"""The frontend in every Chromium. The frontend that a guest names is never passed on: it would control the browser in
the VM, and the daemon if its origin is allowed. On the site that hosts Chromium's frontends, a guest could choose an
old version."""
_ADDRESSES = ("webSocketDebuggerUrl", "devtoolsFrontendUrl")
_ANSWERED = re.compile(r"json(?:/(?:version|list|protocol|new)/?|/(?:activate|close)/[A-Za-z0-9._-]{1,128}|/?)\Z")


class Place(msgspec.Struct, frozen=True):
    """The daemon's address for the browser of one VM."""

    secure: bool
    base: str
    """Host, port and path up to `…/devtools`."""
    ticket: Callable[[], str] | None = None
    """Creates a ticket for one WebSocket, if a key is required."""

    def of(self, path: str) -> str:
        """Returns the address of a WebSocket, without its scheme."""
        return f"{self.base}/{path}" + (f"?ticket={self.ticket()}" if self.ticket is not None else "")


def routes(deps: ApiDeps, relay: Relay, share: FairShare) -> list[StreamRoute]:
    """Returns the routes of this resource."""
    browsers = _Browsers(deps, relay, share)
    return [
        # PUT, as a page of another origin can make a browser send a GET.
        StreamRoute(_NEW, browsers.serve, methods=frozenset({"PUT"}), key_in_query=True, query_is_guests=True),
        StreamRoute(
            _ROUTE,
            browsers.serve,
            methods=frozenset({"GET"}),
            websocket=True,
            key_in_query=True,
            query_is_guests=True,
        ),
    ]


class _Browsers:
    def __init__(self, deps: ApiDeps, relay: Relay, share: FairShare) -> None:
        self._deps = deps
        self._relay = relay
        self._share = share
        self._access = deps.access
        self._answers: WeakValueDictionary[int, trio.CapacityLimiter] = WeakValueDictionary()

    async def serve(self, call: Call) -> None:
        """Answers one request."""
        name, path = call.args
        row = find_vm(self._deps, call.named(name))
        _check(call, path)
        await record_access(self._deps, row, "" if not call.is_websocket else path)
        devtools = row.manifest.devtools
        browser = _Browser(row.id, row.key, devtools.port if devtools is not None else DEVTOOLS_PORT)
        if not await call.while_connected(partial(self._wait, call, browser)):
            return
        # Our access control has checked `Origin`, and `while_connected` has read the body.
        dropped = (b"origin", b"content-length", b"transfer-encoding")
        call.scope = {**call.scope, "headers": [field for field in call.scope["headers"] if field[0] not in dropped]}
        if call.is_websocket:
            await self._websocket(call, browser, path)
        else:
            await call.while_connected(partial(self._answer, call, browser, path))

    # Waiting

    async def _wait(self, call: Call, browser: _Browser) -> None:
        """Waits until the browser listens, or until it should have. :raises Problem: 503, the daemon stops."""
        async with interruptible(call.stopping) as waits:
            over = await waits.until(partial(self._until_it_listens, browser))
        if not over:
            raise call.stopping.problem(vm=browser.vm)

    async def _until_it_listens(self, browser: _Browser) -> bool:
        row = self._deps.store.projection.by_id(browser.vm_id)
        give_up_at = trio.current_time() + (self._patience_s(row) if row is not None else 0.0)
        if row is not None and row.status is not Status.RUNNING and trio.current_time() < give_up_at:
            await self._deps.vms.wait(row.id, {Status.RUNNING}, give_up_at - trio.current_time())
        backoff = Backoff(_FIRST_PAUSE_S, _LAST_PAUSE_S)
        while trio.current_time() + backoff.next_s < give_up_at:
            try:
                async with self._connected(browser):
                    return True
            except Problem as problem:
                if problem.status != 502:
                    break
            await backoff.pause()
        return True

    def _patience_s(self, row: VmRow) -> float:
        if row.status is Status.RUNNING:
            # `updated_at` is when it started, as nothing has changed since.
            return min(WAIT_S, WAIT_S - (self._deps.host.clock.now() - row.updated_at).total_seconds())
        return WAIT_S if row.desired is Desired.RUNNING else 0.0

    # Reaching the browser

    @asynccontextmanager
    async def _connected(self, browser: _Browser) -> AsyncIterator[AgentClient]:
        """Opens a connection to the browser, for one request. :raises Problem: 404, 409 and 502."""
        try:
            async with to_port(self._deps.vms.guests.agent(browser.key), browser.vm, browser.port) as client:
                yield client
        except Problem as problem:
            if problem.code != "port-unreachable":
                raise
            raise Problem(
                502, "browser-unreachable", f"no browser listens on port {browser.port} in VM {browser.vm!r}",
                vm=browser.vm,
                hint=f"`volar vms logs {browser.vm}` shows the output of its workload; "
                "set another port in the plugin's manifest, as devtools.port",
            ) from None  # fmt: skip

    async def _websocket(self, call: Call, browser: _Browser, path: str) -> None:
        found = _SOCKET_PATH.match(path)
        own = found[1] if found is not None else await self._own_socket(browser)
        target = _with_query(f"/devtools/{own}", call)
        async with self._connected(browser) as client:
            ended = moved(self._deps, browser.vm_id, browser.key)
            server = GuestServer(browser.vm, browser.host, target, ended)
            await self._relay.run(call, client, server, share=browser.vm_id)

    async def _own_socket(self, browser: _Browser) -> str:
        """Returns the path of the browser's own WebSocket, as the browser reports it."""
        version = _decoded(await self._ask(browser, "GET", "/json/version"), browser)
        found = _SOCKET_URL.match(_address(version, "webSocketDebuggerUrl")) if isinstance(version, dict) else None
        if found is None:
            raise browser.problem("does not report the address of its WebSocket")
        return found[1]

    async def _answer(self, call: Call, browser: _Browser, path: str) -> None:
        """Answers an HTTP request, with the daemon's addresses in place of the guest's."""
        limiter = self._answers.setdefault(browser.vm_id, trio.CapacityLimiter(_ANSWERS_AT_ONCE))
        async with limiter:
            body = await self._ask(browser, call.method, _with_query(f"/{path}", call))
            media = b"application/json"
            if path.startswith(("json/activate/", "json/close/")):
                media = b"text/plain; charset=utf-8"
            elif not path.startswith("json/protocol"):
                pages = _decoded(body, browser)
                if isinstance(pages, list) and len(pages) > _MAX_PAGES:
                    raise browser.problem(f"reports more than {_MAX_PAGES} pages")
                body = msgspec.json.encode(rewritten(pages, self._place(call, browser)))
        length = (b"content-length", b"%d" % len(body))
        await call.reject(200, [(b"content-type", media), length, (b"cache-control", b"no-store"), SANDBOX], body)

    def _place(self, call: Call, browser: _Browser) -> Place:
        secure, netloc = self._access.own_address(call.scope)
        path = f"/ws/v1/vms/{browser.vm}/devtools"
        caller = for_ticket(call.scope, call.scope["state"]["caller"])
        caller = msgspec.structs.replace(caller, project=browser.key.project)
        issue = partial(self._access.tickets.issue, browser.vm_id, path=path, caller=caller)
        return Place(secure, netloc + path, issue if self._access.asks_for_key else None)

    async def _ask(self, browser: _Browser, method: str, target: str) -> bytes:
        """Returns the browser's answer if its status is 200. :raises Problem: 404, 409 and 502."""
        try:
            with trio.fail_after(_ANSWER_S):
                status, body = await self._exchange(browser, method, target)
        except trio.TooSlowError:
            raise browser.problem(f"has not answered within {_ANSWER_S:g} s") from None
        if status == 200:
            return body
        text = " ".join(body[:200].decode("utf-8", "replace").split())
        if status == 404:
            raise Problem(404, "not-found", f"the browser in VM {browser.vm!r} answers: {text}", vm=browser.vm)
        raise browser.problem(f"answers with {status}: {text}")

    async def _exchange(self, browser: _Browser, method: str, target: str) -> tuple[int, bytes]:
        body = bytearray()
        try:
            async with (
                self._connected(browser) as client,
                client.stream(method, target, [(b"host", browser.host)], timeout_s=_ANSWER_S) as response,
            ):
                while data := await response.receive():
                    await self._share.take(browser.vm_id, len(data))
                    body += data
                    if len(body) > _MAX_ANSWER:
                        raise browser.problem(f"answers with more than {_MAX_ANSWER} bytes")
                return response.status, bytes(body)
        except* (AgentUnreachable, AgentProtocolError) as group:
            raise browser.problem(f"does not answer: {first_text(group)}") from None


class _Browser(msgspec.Struct, frozen=True):
    """The browser that a request addresses."""

    vm_id: int
    key: Key
    port: int

    @property
    def vm(self) -> str:
        return self.key.name

    @property
    def host(self) -> bytes:
        """The `Host` that the browser accepts; it refuses other names because of DNS rebinding."""
        return b"localhost:%d" % self.port

    def problem(self, what: str) -> Problem:
        """Returns the 502 for a browser that can't be used."""
        return Problem(
            502, "browser-failed", f"what listens on port {self.port} in VM {self.vm!r} {what}", vm=self.vm
        )  # fmt: skip


def _check(call: Call, path: str) -> None:
    """Checks the path of a request. :raises Problem: 404, no such route; 426, it only accepts a WebSocket."""
    is_socket = path == "browser" or _SOCKET_PATH.match(path) is not None
    if is_socket and not call.is_websocket:
        raise Problem(426, "upgrade-required", "this is a WebSocket", hint="connect with ws://")
    if is_socket != call.is_websocket or not (is_socket or _ANSWERED.match(path)):
        raise _nothing_there(path)
    # The routes go by the path as it was sent, in which `json%2Fnew` is none that opens a page.
    if path.rstrip("/") == "json/new" and call.method != "PUT":
        raise _nothing_there(path)


def _with_query(path: str, call: Call) -> str:
    query = without_credentials(call.scope["query_string"]).decode("ascii")
    return f"{path}?{query}" if query else path


def _nothing_there(path: str) -> Problem:
    return Problem(
        404, "not-found", f"there is nothing at devtools/{path[:100]}",
        hint="there are json/version, json/list, json/protocol and json/new, and the WebSockets devtools/browser, "
        "devtools/browser/ID and devtools/page/ID",
    )  # fmt: skip


def _decoded(body: bytes, browser: _Browser) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise browser.problem("is no browser: its answer is not JSON") from None


def _address(answer: Mapping[str, Any], name: str) -> str:
    found = answer.get(name)
    return found if isinstance(found, str) and len(found) <= _MAX_ADDRESS else ""


def _frontend_socket(url: str) -> str | None:
    """Returns the path of the WebSocket in a frontend's address."""
    try:
        query = urlsplit(url).query
    except ValueError:
        return None
    for name, value in parse_qsl(query):
        if name in ("ws", "wss") and (found := _FRONTEND_SOCKET.match(value)) is not None:
            return found[1]
    return None


def rewritten(answer: Any, place: Place) -> Any:
    """Returns a browser's answer about itself or its pages, with addresses that lead through `place`."""
    if isinstance(answer, list):
        return [rewritten(one, place) if isinstance(one, Mapping) else one for one in answer]
    if not isinstance(answer, Mapping):
        return answer
    # The prefix also removes `devtoolsFrontendUrlCompat` of Node.js.
    moved = {key: value for key, value in answer.items() if not str(key).startswith(_ADDRESSES)}
    socket = _SOCKET_URL.match(_address(answer, "webSocketDebuggerUrl"))
    frontend = _frontend_socket(_address(answer, "devtoolsFrontendUrl"))
    # Chromium names the same WebSocket in both, so one ticket is enough.
    addresses: dict[str, str] = {}

    def address(path: str) -> str:
        if path not in addresses:
            addresses[path] = place.of(path)
        return addresses[path]

    scheme = "wss" if place.secure else "ws"
    if frontend is not None:
        moved["devtoolsFrontendUrl"] = f"{_BUNDLED_FRONTEND}?{scheme}={quote(address(frontend), safe='/:[]')}"
    if socket is not None:
        moved["webSocketDebuggerUrl"] = f"{scheme}://{address(socket[1])}"
    return moved
