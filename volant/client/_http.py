"""HTTP requests to the daemon, with a deadline each, and errors as exceptions of this package."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar
from uuid import uuid4

import httpx
import msgspec
import trio

from volant import __version__
from volant.model import invalid

from ._address import KEEPALIVE, Address, reason_of
from ._errors import ClientProblem, ConnectionLost, DeadlineExceeded, UnexpectedAnswer, Unreachable

T = TypeVar("T")

Query = Mapping[str, str | int | Sequence[str] | None]
"""A parameter that is None is left out; a sequence repeats it."""

_KEY = re.compile(r"[\x21-\x7e]{1,1000}\Z")
_ONCE = re.compile(r"[\x21-\x7e]{1,255}\Z")

CONNECT_S = 5.0
ANSWER_S = 30.0
_AGAIN_S = 20.0
_AGAIN_PAUSE_S = 0.25
_MAX_BODY = 64 * 1024 * 1024
_MAX_ERROR_BODY = 1024 * 1024


class _WireProblem(msgspec.Struct):
    type: str = ""
    title: str = ""
    detail: str = ""
    request_id: str | None = None
    vm: str | None = None
    field: str | None = None
    hint: str | None = None


class Http:
    """The connections of one client.

    :raises ValueError: `api_key` can't be one; the text does not tell it.
    """

    def __init__(self, address: Address, api_key: str | None) -> None:
        self.address = address
        self.headers = {"User-Agent": f"volant-client/{__version__}"}
        if api_key is not None:
            if not _KEY.match(api_key):
                raise ValueError("the API key is not 1 to 1000 characters of visible ASCII without spaces")
            self.headers["X-Volant-API-Key"] = api_key
        # Without TLS nothing needs the system's certificates, and loading them takes longer than a request.
        self.tls = ssl.create_default_context() if address.tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unix = address.socket_path is not None
        self._client = httpx.AsyncClient(
            base_url=address.http_url,
            headers=self.headers,
            # Neither proxies nor netrc of the environment: they are for the internet, not for a daemon.
            trust_env=False,
            transport=httpx.AsyncHTTPTransport(
                verify=self.tls,
                uds=address.socket_path,
                socket_options=None if unix else KEEPALIVE,
                limits=httpx.Limits(max_connections=256, max_keepalive_connections=8, keepalive_expiry=15),
            ),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        with trio.move_on_after(5, shield=True):
            await self._client.aclose()

    async def get(self, path: str, kind: type[T], query: Query | None = None) -> T:
        """`GET` and decode the answer."""
        return decode(await self.request("GET", path, query=query), kind)

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = ANSWER_S,
        also: Collection[int] = (),
    ) -> httpx.Response:
        """One request and its whole answer, which is a success or has a status of `also`.

        :raises ClientProblem: the daemon answered with an error.
        :raises ClientError: there is no answer, or one that is too long.
        """
        try:
            with trio.fail_after(timeout_s):
                async with self.stream(
                    method, path, query=query, body=body, headers=headers, read_s=timeout_s, also=also
                ) as response:
                    response._content = await self._read(response, _MAX_BODY)
                    return response
        except trio.TooSlowError:
            raise self._too_slow(timeout_s) from None

    async def once(
        self,
        path: str,
        *,
        key: str | None,
        query: Query | None = None,
        body: object = None,
        timeout_s: float = ANSWER_S,
    ) -> httpx.Response:
        """A `POST` that is done once, however often it has to be sent.

        Where the connection breaks before the answer is there, it is sent again under the same `Idempotency-Key`, for
        20 s: a daemon that is restarted meanwhile answers what it has done. A daemon that can't be reached in the first
        place is not waited for.

        :param key: None: one of its own; with a key of the caller's the caller can go on where this gives up
        :raises Problem: 400 `key` can't be one.
        :raises ClientProblem: the daemon answered with an error.
        :raises ClientError: there is no answer; with `ConnectionLost` it may have been done.
        """
        if key is not None and not _ONCE.match(key):
            raise invalid("idempotency_key", "the idempotency key is not 1 to 255 visible ASCII characters, no spaces")
        headers = {"Idempotency-Key": key if key is not None else uuid4().hex}
        lost: ConnectionLost | None = None
        give_up_at = float("inf")
        while True:
            try:
                return await self.request("POST", path, query=query, body=body, headers=headers, timeout_s=timeout_s)
            except ConnectionLost as error:
                if lost is None:
                    give_up_at = trio.current_time() + _AGAIN_S
                lost = error
            except Unreachable:
                if lost is None:
                    raise
            except ClientProblem as problem:
                # The one before may not have noticed yet that its client has left.
                if lost is None or problem.code != "idempotency-key-in-use":
                    raise
            if trio.current_time() + _AGAIN_PAUSE_S > give_up_at:
                raise lost
            await trio.sleep(_AGAIN_PAUSE_S)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        content: bytes | httpx.AsyncByteStream | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float | None,
        also: Collection[int] = (),
    ) -> AsyncIterator[httpx.Response]:
        """A request whose answer is read piece by piece; `read_s` is the longest silence, None any. `body` is sent as
        JSON, `content` as it is: in chunks, unless it is bytes or the headers say how long it is.

        Errors of the connection are raised as those of this package, also from within the block.
        """
        sent = dict(headers or {})
        if isinstance(content, httpx.AsyncByteStream) and "Content-Length" not in sent:
            sent["Transfer-Encoding"] = "chunked"
        if body is not None:
            content = msgspec.json.encode(body)
            sent["Content-Type"] = "application/json"
        request = self._client.build_request(
            method,
            path,
            params={key: value for key, value in (query or {}).items() if value is not None},
            content=content if isinstance(content, bytes) else None,
            headers=sent,
            timeout=httpx.Timeout(CONNECT_S, read=read_s, write=ANSWER_S),
        )
        request.stream = content if isinstance(content, httpx.AsyncByteStream) else RequestBody(content or b"")
        try:
            response = await self._client.send(request, stream=True)
            try:
                if not response.is_success and response.status_code not in also:
                    raise await self.problem_of(response)
                yield response
            finally:
                with trio.move_on_after(1, shield=True):
                    await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self.address.unreachable(reason_of(error)) from error
        except httpx.TimeoutException as error:
            raise self._too_slow(read_s or ANSWER_S) from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise ConnectionLost(f"the connection to {self.address.text} broke: {reason_of(error)}") from error
        finally:
            if isinstance(content, httpx.AsyncByteStream):
                with trio.move_on_after(1, shield=True):
                    await content.aclose()

    async def problem_of(self, response: httpx.Response) -> ClientProblem:
        """The exception for an answer that is an error, read to its end."""
        return problem(response.status_code, response.headers, await self._error_body(response))

    async def _error_body(self, response: httpx.Response) -> bytes:
        """What explains an error; nothing, when that takes too long or is too much."""
        with trio.move_on_after(ANSWER_S):
            try:
                return await self._read(response, _MAX_ERROR_BODY)
            except UnexpectedAnswer:
                pass
        return b""

    async def _read(self, response: httpx.Response, maximum: int) -> bytes:
        body = bytearray()
        async with chunks_of(response) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > maximum:
                    raise UnexpectedAnswer(f"the answer of {self.address.text} is longer than {maximum} bytes")
        return bytes(body)

    def _too_slow(self, timeout_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self.address.text} did not answer within {timeout_s:g} s", hint="what was asked for may still be done"
        )


class RequestBody(httpx.AsyncByteStream):
    """The body of a request, in one piece.

    httpx's own is an async generator, which a request that is cancelled while it is sent leaves half-way, to be closed
    by the garbage collector.
    """

    def __init__(self, data: bytes) -> None:
        self._pieces = [data]

    def __aiter__(self) -> RequestBody:
        return self

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop()


@asynccontextmanager
async def chunks_of(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body of an answer, for a block that may be left at any piece of it.

    httpx reads through a chain of async generators, and one that is dropped half-way is closed by the garbage
    collector, whenever that runs. Closing its last link does not close the others; a cancelled read ends them all.
    """
    chunks = response.aiter_bytes()
    try:
        yield chunks
    finally:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                async for _ in chunks:
                    pass
            except (httpx.TransportError, httpx.StreamError):
                pass


def decode(response: httpx.Response, kind: type[T]) -> T:
    """The body of an answer; :raises UnexpectedAnswer: it is not what the contract says."""
    return decode_json(response.content, kind, f"the answer to {response.request.method} {response.request.url.path}")


def decode_json(data: bytes | str, kind: type[T], what: str) -> T:
    """`data` as `kind`; :raises UnexpectedAnswer: it is no JSON, or of other types."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(
            f"{what} is not understood: {error}",
            hint="is this a volantd, and of about the same version as this client?",
        ) from error


def problem(status: int, headers: Mapping[str, str], body: bytes) -> ClientProblem:
    """The exception for an answer that is an error, whoever gave it."""
    request_id = headers.get("x-request-id")
    try:
        wire = msgspec.json.decode(body, type=_WireProblem)
    except (msgspec.DecodeError, RecursionError):
        return ClientProblem(
            status,
            "unexpected-answer",
            f"the answer is HTTP status {status} without an explanation",
            hint="is this a volantd, or a proxy before one?",
            request_id=request_id,
        )
    return ClientProblem(
        status,
        wire.type.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "problem",
        wire.detail or wire.title or f"HTTP status {status}",
        field=wire.field,
        hint=wire.hint,
        vm=wire.vm,
        request_id=wire.request_id or request_id,
    )
