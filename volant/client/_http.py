"""HTTP requests on Trio with httpx: whole answers, and answers that are read in pieces."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import trio

from ._address import Address, reason_of
from ._connection import KEEPALIVE
from ._errors import ClientProblem, UnexpectedAnswer
from ._tls import Tls
from ._transport import ANSWER_S, CONNECT_S, MAX_BODY, MAX_ERROR_BODY, Answer, Request, Transport, encoding, problem


class Http(Transport):
    """The connections of one client.

    :raises ValueError: `api_key` is malformed, or a file of `tls` can't be used; the text does not contain the key.
    """

    def __init__(
        self,
        address: Address,
        api_key: str | None,
        tls: Tls | None = None,
        project: str | None = None,
        host: str | None = None,
    ) -> None:
        super().__init__(address, api_key, tls, project, host)
        # Without TLS the system's certificates are not needed, and loading them takes longer than a request.
        self.tls = self.tls_options.context() if address.tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unix = address.socket_path is not None
        self._client = httpx.AsyncClient(
            base_url=address.http_url,
            headers=self.headers,
            # No proxies and no netrc of the environment: those are for the internet, not for a daemon.
            trust_env=False,
            transport=httpx.AsyncHTTPTransport(
                verify=self.tls,
                uds=address.socket_path,
                socket_options=None if unix else KEEPALIVE,
                limits=httpx.Limits(max_connections=256, max_keepalive_connections=8, keepalive_expiry=15),
            ),
        )

    async def aclose(self) -> None:
        """Closes all connections."""
        with trio.move_on_after(5, shield=True):
            await self._client.aclose()

    async def send(self, request: Request, *, timeout_s: float = ANSWER_S) -> Answer:
        try:
            with trio.fail_after(timeout_s):
                async with self.stream(request, read_s=timeout_s) as response:
                    content = await self._read(response, MAX_BODY)
                    name = f"{request.method} {request.path}"
                    return Answer(name, response.status_code, dict(response.headers), content)
        except trio.TooSlowError:
            raise self.too_slow(timeout_s) from None

    def _now(self) -> float:
        return trio.current_time()

    async def _sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    @asynccontextmanager
    async def stream(
        self, request: Request, *, read_s: float | None, content: bytes | httpx.AsyncByteStream | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Sends a request whose answer is read in pieces.

        Errors of the connection are raised as errors of this package, also from within the block.

        :param read_s: maximum wait for a piece of the answer; None for no limit
        :param content: a body that is sent unchanged; in chunks, unless it is bytes or the headers have its length
        """
        sent = dict(request.headers)
        if isinstance(content, httpx.AsyncByteStream) and "Content-Length" not in sent:
            sent["Transfer-Encoding"] = "chunked"
        with encoding():
            if request.body is not None:
                content = msgspec.json.encode(request.body)
                sent["Content-Type"] = "application/json"
            outgoing = self._client.build_request(
                request.method,
                request.path,
                params={key: value for key, value in (request.query or {}).items() if value is not None},
                content=content if isinstance(content, bytes) else None,
                headers=sent,
                extensions={"trace": self._trace},
                timeout=httpx.Timeout(CONNECT_S, read=read_s, write=ANSWER_S),
            )
        outgoing.stream = content if isinstance(content, httpx.AsyncByteStream) else RequestBody(content or b"")
        try:
            response = await self._client.send(outgoing, stream=True)
            try:
                if not response.is_success and response.status_code not in request.also:
                    raise await self.problem_of(response)
                yield response
            finally:
                with trio.move_on_after(1, shield=True):
                    await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self.address.unreachable(reason_of(error)) from error
        except httpx.TimeoutException as error:
            raise self.too_slow(read_s or ANSWER_S) from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise self.lost(reason_of(error)) from error
        finally:
            if isinstance(content, httpx.AsyncByteStream):
                with trio.move_on_after(1, shield=True):
                    await content.aclose()

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Checks a new connection: httpx calls it while it serves a request, also before it sends the head over a new
        connection."""
        if event == "connection.connect_tcp.complete":
            stream = info["return_value"]
            try:
                self.check_server(stream.get_extra_info("socket"))
            except BaseException:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
                raise

    async def problem_of(self, response: httpx.Response) -> ClientProblem:
        """Returns the exception for an error response, whose body it reads."""
        return problem(response.status_code, response.headers, await self._error_body(response))

    async def _error_body(self, response: httpx.Response) -> bytes:
        """Returns the body of an error response; empty if it takes too long or is too large."""
        with trio.move_on_after(ANSWER_S):
            try:
                return await self._read(response, MAX_ERROR_BODY)
            except UnexpectedAnswer:
                pass
        return b""

    async def _read(self, response: httpx.Response, maximum: int) -> bytes:
        body = bytearray()
        async with chunks_of(response) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > maximum:
                    raise self.too_long(maximum)
        return bytes(body)


class RequestBody(httpx.AsyncByteStream):
    """The body of a request, in one piece.

    httpx's own class is an async generator. A request that is cancelled while it is sent would leave the generator
    unfinished, to be closed by the garbage collector.
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
    """Returns the body of an answer in pieces, for a block that may be left at any of them.

    httpx reads through a chain of async generators. If they were dropped unfinished, the garbage collector would close
    them at some time. Closing the last of them does not close the others, but a cancelled read ends all of them.
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
