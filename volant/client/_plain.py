"""Requests over blocking sockets, for programs without Trio and httpx, which are slow to import.

Methods are coroutines, as in every transport, but never wait for an event loop: `run_plain` runs one to its end.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import h11
import msgspec

from ._address import DEFAULT_BASE, Address, reason_of
from ._requests import Requests
from ._tls import Tls
from ._transport import ANSWER_S, CONNECT_S, MAX_BODY, MAX_ERROR_BODY, Answer, Request, Transport, encoding, problem

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

_MAX_HEAD = 100 * 1024
"""Maximum size of the head of an answer, the same as in httpx."""
_PIECE = 64 * 1024
_FULL_S = 0.05
"""How long to wait before another attempt at a Unix socket whose queue is full."""


class PlainClient(Requests):
    """A client without streams: `run_plain(PlainClient().vms.list())`.

    :param within_s: deadline for all requests together, in seconds from now; None for a separate deadline per request
    :raises ValueError: `base_url` is no address, `api_key` is malformed, or a file of `tls` can't be used.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        project: str | None = None,
        host: str | None = None,
        within_s: float | None = None,
    ) -> None:
        super().__init__(Plain(Address.parse(base_url), api_key, within_s, tls, project, host))


def run_plain(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that only awaits methods of a `PlainClient`, and returns its result.

    :raises RuntimeError: it waits for something else, which needs an event loop.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    name = getattr(coroutine, "__qualname__", repr(coroutine))
    coroutine.close()
    raise RuntimeError(f"{name} waits for something, and only an event loop could continue it")


class Plain(Transport):
    """Sends each request over a separate connection."""

    def __init__(
        self,
        address: Address,
        api_key: str | None,
        within_s: float | None = None,
        tls: Tls | None = None,
        project: str | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(address, api_key, tls, project, host)
        self._context = self.tls_options.context() if address.tls else None
        self._end = float("inf") if within_s is None else self._now() + within_s

    async def send(self, request: Request, *, timeout_s: float = ANSWER_S) -> Answer:
        give_up_at = min(self._now() + timeout_s, self._end)
        with encoding():
            content = b"" if request.body is None else msgspec.json.encode(request.body)
            query = {key: value for key, value in (request.query or {}).items() if value is not None}
            text = urlencode(query, doseq=True)
        sent = {"Host": self.address.host_header, "Accept": "*/*", "Accept-Encoding": "identity"}
        sent |= {"Connection": "close", **self.headers, **request.headers}
        if request.body is not None:
            sent["Content-Type"] = "application/json"
        if content or request.method != "GET":
            sent["Content-Length"] = str(len(content))
        target = f"{self.address.prefix}{request.path}" + (f"?{text}" if text else "")
        outgoing = h11.Request(method=request.method, target=target, headers=list(sent.items()))
        exchange = _Exchange(give_up_at)
        with connect(self.address, min(give_up_at, self._now() + CONNECT_S), self._context) as connection:
            self.check_server(connection)
            try:
                exchange.send(connection, outgoing, content)
                head = exchange.read_head(connection)
                is_error = not 200 <= head.status_code < 300 and head.status_code not in request.also
                maximum = MAX_ERROR_BODY if is_error else MAX_BODY
                answered = exchange.read_body(connection, maximum)
            except TimeoutError:
                raise self.too_slow(timeout_s) from None
            except (OSError, h11.RemoteProtocolError) as error:
                raise self.lost(reason_of(error)) from error
        found = _headers(head)
        if is_error:
            raise problem(head.status_code, found, answered or b"")
        if answered is None:
            raise self.too_long(maximum)
        return Answer(f"{request.method} {request.path}", head.status_code, found, answered)

    def _now(self) -> float:
        return time.monotonic()

    async def _sleep(self, seconds: float) -> None:
        _pause(seconds)


class _Exchange:
    """One request and its answer, until the deadline."""

    def __init__(self, give_up_at: float) -> None:
        self._give_up_at = give_up_at
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)

    def send(self, connection: socket.socket, head: h11.Request, content: bytes) -> None:
        """Sends the request. :raises TimeoutError: the deadline is over."""
        data = (self._parser.send(head) or b"") + (self._parser.send(h11.Data(content)) or b"")
        data += self._parser.send(h11.EndOfMessage()) or b""
        connection.settimeout(_left(self._give_up_at))
        try:
            connection.sendall(data)
        except TimeoutError:
            raise
        except OSError:
            # A daemon that refuses a request may answer before it has read all of it, so try to read the answer.
            pass

    def read_head(self, connection: socket.socket) -> h11.Response:
        """Returns the status and the headers.

        :raises TimeoutError: the deadline is over.
        :raises OSError: the connection broke.
        :raises h11.RemoteProtocolError: this is not HTTP, or ends too early.
        """
        while not isinstance(event := self._next(connection), h11.Response):
            # Informational responses come first: 100, 102 or 103.
            assert isinstance(event, h11.InformationalResponse), event
        return event

    def read_body(self, connection: socket.socket, maximum: int) -> bytes | None:
        """Returns the body; None if it is longer than `maximum` bytes. Raises the same errors as `read_head`."""
        body = bytearray()
        while isinstance(event := self._next(connection), h11.Data):
            body += event.data
            if len(body) > maximum:
                return None
        return bytes(body)

    def _next(self, connection: socket.socket) -> object:
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            connection.settimeout(_left(self._give_up_at))
            data = connection.recv(_PIECE)
            if not data and self._parser.their_state is h11.SEND_RESPONSE:
                raise h11.RemoteProtocolError("Server disconnected without sending a response.")
            self._parser.receive_data(data)
        return event


def _headers(head: h11.Response) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in head.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def connect(address: Address, give_up_at: float, context: ssl.SSLContext | None = None) -> socket.socket:
    """Connects. :raises Unreachable: there is no connection in time."""
    began = time.monotonic()
    try:
        if address.socket_path is not None:
            return _connect_unix(address.socket_path, give_up_at)
        connection = _connect_tcp(address.host, address.port, give_up_at)
        return connection if context is None else _secured(connection, address.host, give_up_at, context)
    except TimeoutError:
        raise address.unreachable(f"no connection within {max(0, give_up_at - began):.2g} s") from None
    except (OSError, UnicodeError) as error:
        raise address.unreachable(reason_of(error)) from error


def _connect_unix(path: str, give_up_at: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            connection.settimeout(_left(give_up_at))
            try:
                connection.connect(path)
            except BlockingIOError:
                # The socket's queue is full.
                _pause(_FULL_S)
            else:
                return connection
    except BaseException:
        connection.close()
        raise


def _connect_tcp(host: str, port: int, give_up_at: float) -> socket.socket:
    """Tries the addresses of `host` in order; each gets an equal part of the remaining time."""
    failure: OSError | None = None
    addresses = _resolve(host, port, give_up_at)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(give_up_at) / (len(addresses) - index))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = failure or error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    assert failure is not None
    raise failure


def _resolve(host: str, port: int, give_up_at: float) -> list[Any]:
    """Looks up the addresses of `host` in a separate thread, as a resolver has no deadline."""
    found: list[Any] = []
    failure: list[Exception] = []

    def resolve() -> None:
        try:
            # As bytes: the codec for other names takes a while to import, and an address has none.
            found.extend(socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM))
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_left(give_up_at))
    if failure:
        raise failure[0]
    if thread.is_alive():
        raise TimeoutError
    return found


def _secured(connection: socket.socket, host: str, give_up_at: float, context: ssl.SSLContext) -> socket.socket:
    try:
        connection.settimeout(_left(give_up_at))
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def _left(give_up_at: float) -> float:
    """Returns the remaining seconds. :raises TimeoutError: the time is up."""
    left_s = give_up_at - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _pause(seconds: float) -> None:
    time.sleep(seconds)
