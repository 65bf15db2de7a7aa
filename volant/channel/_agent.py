"""HTTP/1.1 to the agent: one byte stream, one request.

No keep-alive and no pool: opening a stream costs nothing, its end notifies the agent that the client has disconnected,
and no connection can get out of sync with its requests. Streams to other hosts cost a handshake, and are reused
(`ChannelStream.is_persistent`). A separate task sends the request's body, so that the agent may answer early. The
answer is read as the caller consumes it: the stream's flow control is the only buffer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import h11
import msgspec
import trio

from volant.model.agent import MAX_HEAD_BYTES, MAX_JSON_BYTES
from volant.model.heads import MAX_FIELDS, head_of

from ._channel import Channel
from ._stream import WHY_CHARACTERS, AgentProtocolError, AgentUnreachable, ChannelStream, PrefixedStream

Header = tuple[bytes, bytes]

_RECEIVE = 256 * 1024
"""Maximum bytes of a body to receive at once."""
_RECEIVE_HEAD = 8 * 1024
"""Maximum bytes of a head to receive at once. Small, as h11 does not limit a head that arrives in one piece."""
_MAX_INFORMATIONAL = 16
_CLOSE_BODY_S = 1.0


class AgentAnswer(msgspec.Struct, frozen=True):
    """A complete JSON answer."""

    status: int
    body: Any
    """None if there was none."""


class AgentResponse:
    """The head of an answer, and access to its body. `AgentClient.stream` creates it."""

    def __init__(self, exchange: _Exchange, status: int, reason: bytes, headers: list[Header]) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        """The headers as sent by the agent, in order, with names in lower case."""
        self._exchange = exchange

    @property
    def switched(self) -> bool:
        """Whether the answer switched protocols (101, or 2xx to CONNECT): see `upgraded`."""
        return self._exchange.switched

    async def receive(self) -> bytes:
        """Returns the next piece of the body, empty at its end. Also raises the errors of the request's body.

        :raises AgentUnreachable: the body is interrupted
        :raises AgentProtocolError: the answer is malformed
        """
        return await self._exchange.receive_body()

    def __aiter__(self) -> AgentResponse:
        return self

    async def __anext__(self) -> bytes:
        data = await self.receive()
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self, limit: int) -> bytes:
        """Returns the whole body. Raises the errors of `receive`.

        :raises AgentProtocolError: the body is longer than `limit` bytes
        """
        body = bytearray()
        while data := await self.receive():
            body += data
            if len(body) > limit:
                raise AgentProtocolError(f"the agent's answer is longer than {limit} bytes")
        return bytes(body)

    def upgraded(self) -> ChannelStream:
        """Returns the raw stream after a switch of protocols, preceded by the bytes that were read already. The block
        of `AgentClient.stream` closes it."""
        return self._exchange.upgraded()


class AgentClient:
    """Requests to the agent of one guest."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def request_json(
        self, method: str, path: str, body: Any = None, *, timeout_s: float, reserved: bool = True
    ) -> AgentAnswer:
        """Sends one of the daemon's own requests; returns the JSON answer, whatever its status.

        :param body: the value of the JSON body; None for no body
        :param timeout_s: the deadline for the whole request
        :raises AgentUnreachable: there was no complete answer in time
        :raises AgentProtocolError: the answer is malformed
        """
        headers: list[Header] = []
        data = None
        if body is not None:
            data = msgspec.json.encode(body)
            headers.append((b"content-type", b"application/json"))
        try:
            with trio.fail_after(timeout_s):
                async with self.stream(method, path, headers, data, timeout_s=timeout_s, reserved=reserved) as response:
                    text = await response.read(MAX_JSON_BYTES)
        except trio.TooSlowError:
            raise AgentUnreachable(f"the agent did not answer {method} {path} within {timeout_s:g} s") from None
        if not text:
            return AgentAnswer(response.status, None)
        try:
            return AgentAnswer(response.status, msgspec.json.decode(text))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise AgentProtocolError(f"the agent's answer to {method} {path} is not JSON: {error}") from error

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        headers: Iterable[Header] = (),
        body: bytes | AsyncIterable[bytes] | None = None,
        *,
        timeout_s: float,
        reserved: bool = False,
    ) -> AsyncIterator[AgentResponse]:
        """Sends a request, streamed in both directions; the block begins with the head of the answer. Leaving the block
        closes the stream, which cancels the request in the guest. Also raises the errors of `body`.

        :param headers: sent unchanged; without hop-by-hop fields except `Upgrade` and its `Connection`. `host` is added
        :param body: sent in chunks if there is no `content-length`
        :param timeout_s: the deadline for the head of the answer; the body has none
        :raises AgentUnreachable: there was no answer in time, or it was interrupted
        :raises AgentProtocolError: the answer is malformed
        :raises ValueError: HTTP does not allow this request
        """
        stream = await self._channel.open_stream(timeout_s=timeout_s, reserved=reserved)
        async with stream:
            exchange = _Exchange(stream)
            try:
                with trio.fail_after(timeout_s):
                    response = await exchange.begin(self._channel, method, target, list(headers), body)
            except trio.TooSlowError:
                exchange.stop()
                raise AgentUnreachable(f"the agent did not answer {method} within {timeout_s:g} s") from None
            except BaseException:
                exchange.stop()
                raise
            try:
                yield response
            finally:
                stream.is_free = exchange.is_complete
                exchange.stop()


class _Exchange:
    """One request and its answer on one stream."""

    def __init__(self, stream: ChannelStream) -> None:
        self.switched = False
        self._stream = stream
        self._conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._sender = trio.CancelScope()
        self._body_error: BaseException | None = None
        self._receiver: trio.CancelScope | None = None
        self._over = False
        self._ended = False
        self._is_sent = False
        self._is_answered = False
        self._may_persist = False
        self._left: int | None = None
        """The remaining length of the body, if known. For an answer without a body (`HEAD`) h11 reports its end before
        anything is received."""

    async def begin(
        self,
        channel: Channel,
        method: str,
        target: str,
        headers: list[Header],
        body: bytes | AsyncIterable[bytes] | None,
    ) -> AgentResponse:
        names = {name.lower() for name, _ in headers}
        if b"host" not in names:
            headers.insert(0, (b"host", b"agent"))
        if isinstance(body, bytes):
            if b"content-length" not in names:
                headers.append((b"content-length", b"%d" % len(body)))
        elif body is not None and not names & {b"content-length", b"transfer-encoding"}:
            headers.append((b"transfer-encoding", b"chunked"))
        if b"connection" not in names and not self._stream.is_persistent:
            headers.append((b"connection", b"close"))
        try:
            head = self._encode(h11.Request(method=method, target=target, headers=headers))
            if body is None or isinstance(body, bytes):
                whole = head + (self._encode(h11.Data(data=body)) if body else b"") + self._encode(h11.EndOfMessage())
                channel.start_soon(partial(self._send_whole, whole))
            else:
                channel.start_soon(partial(self._send_stream, head, body))
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise ValueError(str(error)) from error
        return await self._receive_head()

    @property
    def is_complete(self) -> bool:
        """Whether request and answer have ended, and neither side ends the connection with them."""
        return self._may_persist and self._is_sent and self._is_answered

    def stop(self) -> None:
        self._over = True
        self._sender.cancel()

    # Sending, in a task of the channel, which must not fail

    async def _send_whole(self, data: bytes) -> None:
        with self._sender:
            try:
                await self._stream.send_all(data)
                self._is_sent = True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the answer, or its absence, says why

    async def _send_stream(self, head: bytes, body: AsyncIterable[bytes]) -> None:
        with self._sender:
            try:
                await self._stream.send_all(head)
                async for data in body:
                    if data:
                        await self._stream.send_all(self._encode(h11.Data(data=data)))
                await self._stream.send_all(self._encode(h11.EndOfMessage()))
                self._is_sent = True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except Exception as error:
                # The source of the body failed. The caller gets the error where it waits for the answer.
                self._body_error = error
                if self._receiver is not None:
                    self._receiver.cancel()
            finally:
                # Else an unfinished generator stays open until the garbage collector runs.
                if isinstance(body, AsyncGenerator):
                    with trio.move_on_after(_CLOSE_BODY_S, shield=True):
                        await body.aclose()

    def _encode(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> bytes:
        return self._conn.send(event) or b""

    # Receiving

    async def _receive_head(self) -> AgentResponse:
        for _ in range(_MAX_INFORMATIONAL):
            event = await self._next_event()
            match event:
                case h11.InformationalResponse(status_code=101) | h11.Response():
                    self.switched = self._conn.their_state is h11.SWITCHED_PROTOCOL
                    self._left = _length(event.headers)
                    self._may_persist = event.http_version == b"1.1" and not _closes(event.headers)
                    return AgentResponse(self, event.status_code, event.reason, list(event.headers))
                case h11.InformationalResponse():
                    continue
                case _:
                    raise AgentUnreachable("the agent closed the stream without an answer")
        raise AgentProtocolError("the agent sent one informational response after the other")

    async def receive_body(self) -> bytes:
        while not self._over and not self.switched:
            event = self._parse()
            if event is h11.NEED_DATA:
                data = await self._receive(_RECEIVE if self._left is None else min(_RECEIVE, self._left))
                if self._left is None or not data:
                    self._conn.receive_data(data)
                    continue
                # The rest of a body of known length passes h11 by, which would copy it twice.
                self._left -= len(data)
                self._over = self._is_answered = not self._left
                return data
            await trio.lowlevel.checkpoint()
            if not isinstance(event, h11.Data):
                self._over = True
                # An answer that ends with its stream has no other end, and what comes after one is no answer.
                self._is_answered = not self._ended and not self._conn.trailing_data[0]
            elif event.data:
                if self._left is not None:
                    self._left -= len(event.data)
                return bytes(event.data)
        await trio.lowlevel.checkpoint()
        return b""

    async def _next_event(self) -> Any:
        while (event := self._parse()) is h11.NEED_DATA:
            self._conn.receive_data(await self._receive(_RECEIVE_HEAD))
        await trio.lowlevel.checkpoint()
        return event

    def _parse(self) -> Any:
        """Returns the next event of the received data. Also raises the errors of the request's body."""
        if self._body_error is not None:
            raise self._body_error
        begun = self._conn.their_state is h11.SEND_BODY
        if self._conn.their_state is h11.SEND_RESPONSE and head_of(self._conn._receive_buffer._data)[0] > MAX_FIELDS:
            raise AgentProtocolError(f"its answer has more than {MAX_FIELDS} header fields")
        try:
            return self._conn.next_event()
        except h11.RemoteProtocolError as error:
            if self._ended:
                where = "in the middle of its answer" if begun else "without an answer"
                raise AgentUnreachable(f"it closed the connection {where}") from error
            raise AgentProtocolError(f"the agent broke HTTP: {str(error)[:WHY_CHARACTERS]}") from error

    async def _receive(self, max_bytes: int) -> bytes:
        """Returns the next bytes of the stream, empty at its end. Also raises the errors of the request's body."""
        with trio.CancelScope() as self._receiver:
            try:
                data = await self._stream.receive_some(max_bytes)
            except trio.BrokenResourceError as error:
                raise AgentUnreachable(f"the stream to the agent broke: {error}") from error
            self._ended = not data
            return data
        # The task that sends the body has cancelled it.
        assert self._body_error is not None
        raise self._body_error

    def upgraded(self) -> ChannelStream:
        if not self.switched:
            raise ValueError("the agent did not switch protocols")
        prefix, _ = self._conn.trailing_data
        return PrefixedStream(bytes(prefix), self._stream)


def _closes(headers: Iterable[Header]) -> bool:
    """Returns whether the sender of a head ends the connection after the body."""
    return any(name == b"connection" and b"close" in value.lower() for name, value in headers)


def _length(headers: Iterable[Header]) -> int | None:
    """Returns the length of a body, None if only its end shows it. h11 has checked these fields."""
    fields = dict(headers)
    length = fields.get(b"content-length")
    return None if length is None or b"transfer-encoding" in fields else int(length)
