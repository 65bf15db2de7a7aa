"""Connections to other hosts: HTTP/1.1 over mutual TLS, each for sequential requests.

A handshake costs both hosts three times as much as a small request. So a connection whose answer was read to its end is
kept for the next request. The usual risk is that the other end closes it at that moment, so that it is unknown whether
the request was read. Here a kept connection is only used within seconds, while the other host keeps it for a minute,
and only if nothing arrived on it since: a daemon that stops or dies closes it. So a request is only lost if the daemon
ends at that moment, which would also end a request on a new connection. A host that loses its power closes nothing: it
acknowledges nothing, which is noticed as soon as on a new connection.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct

import trio

from volant.channel import AgentUnreachable, ChannelStream

_CONNECT_S = 5.0
_KEPT_EACH = 8
"""Maximum kept connections per host: as many as the move of a VM uses."""
_LOOK_S = 5.0
"""The interval of checks. A connection is kept for up to twice as long. (A host closes one after 60 s.)"""
_ACKNOWLEDGED = struct.Struct("=24xI28xI")
"""A part of `struct tcp_info`: the number of unacknowledged segments, and the milliseconds since the last
acknowledgement."""
_Tls = trio.SSLStream[trio.SocketStream]


class Connections:
    """The connections of this host to others."""

    def __init__(self, context: ssl.SSLContext) -> None:
        """Creates it. `context` trusts the hosts of the fleet, and presents the certificate of this one."""
        self._context = context
        self._kept: dict[str, list[tuple[float, _Tls]]] = {}
        """The kept connections, each with the time since which it is kept, by address; newest last."""
        self._keeps = False

    async def keep(self) -> None:
        """Keeps connections for the next requests, until cancelled."""
        self._keeps = True
        try:
            while True:
                await trio.sleep(_LOOK_S)
                self._close_older(trio.current_time() - _LOOK_S)
        finally:
            self._keeps = False
            self._close_older(float("inf"))

    async def open(self, address: str, timeout_s: float) -> ChannelStream:
        """Returns a connection to an address, HOST:PORT. :raises AgentUnreachable: it can't be reached, or belongs to
        another host."""
        while kept := self._kept.get(address):
            _, stream = kept.pop()
            if _is_quiet(stream):
                await trio.lowlevel.checkpoint()
                return _Connection(self, address, stream, is_kept=True)
            _close(stream)
        return _Connection(self, address, await self._connect(address, timeout_s), is_kept=False)

    async def _connect(self, address: str, timeout_s: float) -> _Tls:
        name, _, port = address.rpartition(":")
        name = name.removeprefix("[").removesuffix("]")
        try:
            with trio.fail_after(min(timeout_s, _CONNECT_S)):
                tcp = await trio.open_tcp_stream(name, int(port))
                stream = trio.SSLStream(tcp, self._context, server_hostname=name, https_compatible=True)
                try:
                    await stream.do_handshake()
                except BaseException:
                    await trio.aclose_forcefully(tcp)
                    raise
        except (OSError, trio.BrokenResourceError) as error:
            raise AgentUnreachable(f"no connection to {address}: {_reason(error)}") from error
        except (ValueError, OverflowError):
            # Another version of volantd may have written what this one can't read.
            raise AgentUnreachable(f"its address {address[:80]!r} is not HOST:PORT") from None
        except trio.TooSlowError:
            raise AgentUnreachable(f"no connection to {address} within {_CONNECT_S:g} s") from None
        return stream

    def give_back(self, address: str, stream: _Tls) -> None:
        """Keeps a connection on which an answer has ended."""
        kept = self._kept.setdefault(address, [])
        if self._keeps and len(kept) < _KEPT_EACH:
            kept.append((trio.current_time(), stream))
        else:
            _close(stream)

    def _close_older(self, than: float) -> None:
        for address, kept in list(self._kept.items()):
            for since, stream in kept:
                if since < than:
                    _close(stream)
            kept[:] = [each for each in kept if each[0] >= than]
            if not kept:
                del self._kept[address]


class _Connection(ChannelStream):
    """A connection, for one request."""

    is_persistent = True

    def __init__(self, connections: Connections, address: str, stream: _Tls, *, is_kept: bool) -> None:
        self._connections = connections
        self._address = address
        self._stream = stream
        self._is_unsure = is_kept
        """Whether it is unknown if the other host is still there."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Does nothing: TLS has no half-close for HTTP. The other host notices when the connection is closed."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._is_unsure:
            self._is_unsure = False
            with trio.move_on_after(_CONNECT_S) as waited:
                await trio.lowlevel.wait_readable(self._stream.transport_stream.socket)
            if waited.cancelled_caught and not _is_acknowledged(self._stream):
                raise trio.BrokenResourceError(f"it has acknowledged nothing for {_CONNECT_S:g} s")
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        if self.is_free:
            self.is_free = False
            self._connections.give_back(self._address, self._stream)
        else:
            _close(self._stream)
        await trio.lowlevel.checkpoint()


def _is_quiet(stream: _Tls) -> bool:
    """Returns whether nothing has arrived since the last answer, neither the end nor unexpected data."""
    poller = select.poll()
    poller.register(stream.transport_stream.socket.fileno(), select.POLLIN)
    return not poller.poll(0) and not stream.pending()


def _is_acknowledged(stream: _Tls) -> bool:
    """Returns whether the other host's kernel acknowledges data, however long its daemon takes to answer."""
    info = stream.transport_stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
    segments, ago_ms = _ACKNOWLEDGED.unpack(info)
    return bool(segments == 0 or ago_ms < 1000 * _CONNECT_S)


def _close(stream: _Tls) -> None:
    # Without `close_notify`: HTTP shows where an answer ends.
    stream.transport_stream.socket.close()


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(getattr(cause, "verify_message", "") or getattr(cause, "strerror", "") or cause or type(cause).__name__)
