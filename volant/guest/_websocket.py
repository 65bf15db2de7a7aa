"""The server's end of a WebSocket (RFC 6455) on a stream whose request has been read.

wsproto implements the protocol: frames, masks, fragments, UTF-8, the closing handshake. This module bounds messages,
and buffers for a socket that never blocks: `receive` reads once, `send` puts frames into `out`, `flush` writes as much
of `out` as the socket accepts. Compression is never negotiated: inside one machine it costs more than it saves, and
small frames could expand to large messages.
"""

from __future__ import annotations

from ._http import Gone, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wsproto import WSConnection

    from ._http import Request
    from ._stream import Stream

NORMAL = 1000
PROTOCOL_ERROR = 1002
POLICY = 1008
TOO_BIG = 1009
REPLACED = 4000

_READ = 64 * 1024
_MAX_REASON = 120


class WebSocket:
    """One connection."""

    def __init__(self, stream: Stream, request: Request, max_message: int) -> None:
        """Puts the answer to the handshake into `out`.

        :param max_message: bytes of a binary message, or characters of a text
        :raises Problem: 400 or 426, the request is not a handshake
        """
        self.sock = stream.sock
        self.out = bytearray()
        """Bytes that the socket has not accepted yet."""
        self.closing = False
        """Whether either side has sent its closing frame. No messages follow it."""
        self.closed = False
        """Whether both sides have sent it, so that the client has read everything."""
        self._max = max_message
        self._parts: list[str] | list[bytes] = []
        self._size = 0
        self._connection = _accept(request, self.out)
        self._early = bytes(stream.buffer)
        self._unread: list[str | bytes] = []
        stream.buffer.clear()
        stream.answered = True
        self.sock.setblocking(False)

    def receive(self) -> list[str | bytes]:
        """Reads once; returns the complete messages. Answers to pings go into `out`.

        Sets `closing` when the client closes, violates the protocol, or sends a message that is too long.

        :raises Gone: the stream has ended or broken
        """
        if self._unread:
            messages, self._unread = self._unread, []
            return messages
        data, self._early = self._early, b""
        if not data:
            try:
                data = self.sock.recv(_READ)
            except BlockingIOError:
                return []
            except OSError:
                raise Gone from None
            if not data:
                raise Gone
        if self.closing:
            self._await_close(data)
            return []
        self._connection.receive_data(data)
        return self._messages()

    def _await_close(self, data: bytes) -> None:
        """Drops messages until the client answers the closing frame."""
        from wsproto.connection import ConnectionState
        from wsproto.events import CloseConnection

        if not self.closed and self._connection.state is ConnectionState.LOCAL_CLOSING:
            self._connection.receive_data(data)
            self.closed = any(isinstance(event, CloseConnection) for event in self._connection.events())

    @property
    def has_early(self) -> bool:
        """Returns whether `receive` has earlier data, which poll does not report."""
        return bool(self._early or self._unread)

    def unread(self, messages: list[str | bytes]) -> None:
        """Makes the next `receive` return these messages."""
        self._unread = messages

    def _messages(self) -> list[str | bytes]:
        from wsproto.connection import ConnectionState
        from wsproto.events import CloseConnection, Message, Ping

        messages: list[str | bytes] = []
        for event in self._connection.events():
            if isinstance(event, Message):
                self._size += len(event.data)
                if self._size > self._max:
                    self.close(TOO_BIG, f"a message is longer than {self._max} bytes")
                    break
                self._parts.append(event.data)
                if event.message_finished:
                    empty = event.data[:0]
                    messages.append(empty.join(self._parts))
                    self._parts = []
                    self._size = 0
            elif isinstance(event, Ping):
                self.out += self._connection.send(event.response())
            elif isinstance(event, CloseConnection):
                if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    self.closing = True
                    self.out += self._connection.send(event.response())
                else:
                    self.close(int(event.code), event.reason or "")
                break
        return messages

    def send(self, data: str | bytes) -> None:
        """Puts a message into `out`; drops it once `closing`."""
        from wsproto.events import BytesMessage, TextMessage

        if not self.closing:
            event = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
            self.out += self._connection.send(event)

    def close(self, code: int, reason: str = "") -> None:
        """Puts a closing frame into `out`, if neither side has sent one."""
        from wsproto.events import CloseConnection

        if not self.closing:
            self.closing = True
            self.out += self._connection.send(CloseConnection(code=code, reason=reason[:_MAX_REASON]))

    def flush(self) -> int:
        """Writes as much as the socket accepts; returns the number of bytes. :raises Gone: the stream has broken."""
        if not self.out:
            return 0
        try:
            sent = self.sock.send(self.out)
        except BlockingIOError:
            return 0
        except OSError:
            raise Gone from None
        del self.out[:sent]
        return sent


def is_upgrade(request: Request) -> bool:
    """Returns whether a request is for a WebSocket, valid or not."""
    return request.header(b"upgrade").lower() == b"websocket"


def _accept(request: Request, out: bytearray) -> WSConnection:
    import binascii

    from wsproto import ConnectionType, WSConnection
    from wsproto.events import AcceptConnection, Request as Asked
    from wsproto.utilities import ProtocolError

    if not request.framing.empty:
        raise Problem(400, "a request to upgrade can't have a body")
    if request.header(b"sec-websocket-version") != b"13":
        raise Problem(426, "only version 13 of WebSocket is spoken here", headers=[("Sec-WebSocket-Version", "13")])
    try:
        if len(binascii.a2b_base64(request.header(b"sec-websocket-key"), strict_mode=True)) != 16:
            raise ValueError
        connection = WSConnection(ConnectionType.SERVER)
        connection.initiate_upgrade_connection(request.headers, request.target)
        events = list(connection.events())
        if len(events) != 1 or not isinstance(events[0], Asked):
            raise ValueError
    except Exception as error:
        # Also errors of wsproto's parser, and of host names in IDNA.
        text = str(error) if isinstance(error, ProtocolError) else ""
        raise Problem(400, f"this is not a handshake of a WebSocket{': ' if text else ''}{text}") from None
    out += connection.send(AcceptConnection())
    return connection
