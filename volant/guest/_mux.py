"""Byte streams for the agent over one virtio-serial port, multiplexed by HTTP/2 (RFC 9113).

For guests without vsock. The host opens a stream by an HTTP/2 CONNECT whose `:authority` is the vsock port. Each stream
becomes one end of a socketpair, so that the server can't tell it from a connection. HTTP/2 has flow control for each
stream: a reader that sleeps only stops its own sender.

**The port is not a connection.** The host's process may die at any byte and be replaced before the guest notices, so
the guest may wait for the rest of a frame that never arrives. A host that connects therefore sends more zero bytes than
the longest frame has, `RESYNC_MAGIC` and a random nonce. The zeros complete any partial frame and are not a valid frame
themselves, so HTTP/2 fails here at the latest. After any failure the guest *hunts* for the magic (`Hunt`), and answers
with the nonce. The host drops everything before that, and both begin HTTP/2 again. An agent that starts, or loses sync
while the host does not notice, sends zeros, the magic and a nonce of zeros: then the host's HTTP/2 fails, or it asks
again.

**One thread, edge-triggered.** Without a host the port polls as hung up all the time, and a level-triggered loop would
spin. So epoll is edge-triggered, and readiness is remembered until EAGAIN. One thread has all the state of HTTP/2; only
socketpairs connect it to the threads of the server. Rejected: asyncio, which takes half a second to import in a guest
and is level-triggered.

Memory: a stream holds at most `STREAM_WINDOW` bytes that the server has not read, and reads nothing from the server
while the port's buffer has more than `OUTPUT_HIGH`.
"""

from __future__ import annotations

import os
import select
import socket
import time
import traceback

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import hyperframe.frame

from volant.model.agent import AGENT_PORT, MAX_STREAMS, RESERVED_STREAMS, RESYNC_MAGIC, RESYNC_NONCE_BYTES

FRAME = 16384
"""HTTP/2's default for the longest frame, which neither side raises."""
RESYNC_ZEROS = FRAME + 2 * 9
"""Completes the longest frame, a partial header after it, and one more header."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_NO_NONCE = bytes(RESYNC_NONCE_BYTES)
HELLO = bytes(RESYNC_ZEROS) + RESYNC_MAGIC + _NO_NONCE
"""Sent by an agent that starts or has lost sync."""


class Hunt:
    """Looks for the host's magic and nonce and, once they were answered, for the start of HTTP/2."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._nonce = b""  # answered last; empty: none since the link was lost

    def begin(self) -> None:
        """Begins again, as the link is lost."""
        self._data.clear()
        self._nonce = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Processes received data. Returns the bytes to send back, and everything from the start of HTTP/2 on, which is
        empty before that."""
        self._data += data
        answers = b""
        while True:
            magic = self._data.find(RESYNC_MAGIC)
            start = self._data.find(_PREFACE) if self._nonce else -1
            if start >= 0 and (magic < 0 or start < magic):
                rest = bytes(self._data[start:])
                self._data.clear()
                return answers, rest
            if magic < 0:
                # Either may have come in part.
                del self._data[: max(0, len(self._data) - max(len(RESYNC_MAGIC), len(_PREFACE)) + 1)]
                return answers, b""
            after = magic + len(RESYNC_MAGIC)
            nonce = bytes(self._data[after : after + RESYNC_NONCE_BYTES])
            if len(nonce) < RESYNC_NONCE_BYTES:
                del self._data[:magic]
                return answers, b""
            del self._data[: after + RESYNC_NONCE_BYTES]
            # A repeated nonce has its answer already.
            if nonce not in (_NO_NONCE, self._nonce):
                self._nonce = nonce
                answers += nonce


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

STREAM_WINDOW = 128 * 1024
CONNECTION_WINDOW = STREAM_WINDOW * (MAX_STREAMS + RESERVED_STREAMS)
"""The windows of all streams together. With a smaller window, stalled streams would block the others."""
OUTPUT_HIGH = 128 * 1024
OUTPUT_LIMIT = 4 * 1024 * 1024

_SOCKET_BUFFER = 64 * 1024
_READ = 64 * 1024
_PORT_WRITE = 32 * 1024
_REOPEN_S = 1.0
_TOGETHER_S = 0.005
"""How long the acceptance of a stream waits for the answer, to be written with it."""

# h2 writes out each frame that it receives, with its data in hexadecimal digits, for a log that it does not write.
hyperframe.frame.Frame.__repr__ = object.__repr__  # type: ignore[method-assign]


def run(open_port: Callable[[], int], serve: Callable[[socket.socket], None]) -> NoReturn:
    """Serves streams forever, on the calling thread.

    :param open_port: returns a new descriptor of the port, which is closed here; after an OSError it is called again a
        second later
    :param serve: receives a connected, blocking Unix stream socket, and must not block. If it raises, the stream is
        refused. When the host has disconnected, the socket polls as POLLHUP; when it has only ended its request, the
        socket reads as end of file
    """
    while True:
        try:
            fd = open_port()
        except OSError:
            time.sleep(_REOPEN_S)
            continue
        try:
            _Mux(fd, serve).loop()
        except Exception:
            # The port is gone, or this is a bug. Its streams are closed already; the agent must stay reachable.
            traceback.print_exc()
            time.sleep(_REOPEN_S)
        finally:
            os.close(fd)


class _Stream:
    """One HTTP/2 stream and this end of its socketpair."""

    __slots__ = ("ended", "gone", "held", "id", "input_over", "readable", "sock", "writable")

    def __init__(self, stream_id: int, sock: socket.socket) -> None:
        self.id = stream_id
        self.sock = sock
        self.held = bytearray()  # from the host, not read by the server yet
        self.input_over = False  # the host sends no more
        self.ended = False  # we have sent END_STREAM
        self.gone = False  # the server has closed its end
        self.readable = True
        self.writable = True


class _Mux:
    def __init__(self, fd: int, serve: Callable[[socket.socket], None]) -> None:
        self.fd = fd
        self.serve = serve
        self.epoll = select.epoll()
        self.conn: h2.connection.H2Connection | None = None
        self.hunting = Hunt()
        self.out = bytearray()
        self.port_readable = True
        self.port_writable = True
        self.by_id: dict[int, _Stream] = {}
        self.by_fd: dict[int, _Stream] = {}
        self.accepted: list[tuple[_Stream, socket.socket]] = []
        """New streams, with the server's end."""
        self.together_until = 0.0
        """The time until which an acceptance in the output can wait."""

    def loop(self) -> None:
        os.set_blocking(self.fd, False)
        edge = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
        self.epoll.register(self.fd, edge)
        try:
            self.out += HELLO
            while True:
                busy = self.turn()
                wait_s = 0.0 if busy else -1
                if self.together_until and not busy:
                    wait_s = max(0.0, self.together_until - time.monotonic())
                for fd, events in self.epoll.poll(wait_s):
                    if fd == self.fd:
                        self.port_readable = self.port_readable or bool(events & ~select.EPOLLOUT)
                        self.port_writable = self.port_writable or bool(events & select.EPOLLOUT)
                        continue
                    stream = self.by_fd.get(fd)
                    if stream is not None:
                        stream.readable = stream.readable or bool(events & ~select.EPOLLOUT)
                        stream.writable = stream.writable or bool(events & ~select.EPOLLIN)
                        stream.gone = stream.gone or bool(events & select.EPOLLHUP)
        finally:
            self.drop_streams()
            self.epoll.close()

    def turn(self) -> bool:
        """Moves a bounded amount in each direction; returns whether more can be moved at once."""
        if self.port_readable:
            self.read_port()
        more = False
        for stream in list(self.by_id.values()):
            if self.conn is None:
                break  # reading one of them has lost the link
            if stream.writable and (stream.held or stream.input_over):
                self.to_server(stream)
            if stream.readable and not stream.ended and stream.id in self.by_id:
                more = self.from_server(stream) or more
            if stream.gone and stream.ended and stream.id in self.by_id:
                self.reset(stream, h2.errors.ErrorCodes.NO_ERROR)
        self.pass_accepted()
        self.collect()
        if self.together_until and time.monotonic() >= self.together_until:
            self.together_until = 0.0
        may_write = self.port_writable and not self.together_until
        if self.out and may_write:
            self.write_port()
        # Without room in the port, streams wait for its next edge.
        return self.port_readable or (more and len(self.out) < OUTPUT_HIGH) or bool(self.out and may_write)

    # The port

    def read_port(self) -> None:
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            self.port_readable = False
            return
        if not data:
            # No host is connected. The next one's first bytes may come before its connect event, so output is kept.
            self.port_readable = False
            if self.conn is not None:
                self.lose()
            return
        if self.conn is None:
            self.hunt(data)
        else:
            self.receive(data)

    def write_port(self) -> None:
        try:
            count = os.write(self.fd, memoryview(self.out)[:_PORT_WRITE])
        except BlockingIOError:
            self.port_writable = False
            return
        del self.out[:count]

    def collect(self) -> None:
        if self.conn is not None:
            self.out += self.conn.data_to_send()
            if len(self.out) > OUTPUT_LIMIT:
                self.lose()  # the host sends requests and reads nothing

    # The link

    def hunt(self, data: bytes) -> None:
        answers, start = self.hunting.feed(data)
        self.out += answers
        if start:
            self.begin()
            self.receive(start)

    def begin(self) -> None:
        config = h2.config.H2Configuration(
            client_side=False,
            header_encoding=None,
            # The host is trusted, and checks cost a small guest time.
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        conn = h2.connection.H2Connection(config)
        conn.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                # Above our own limit, so that `open` refuses one stream instead of h2 ending them all.
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 2 * (MAX_STREAMS + RESERVED_STREAMS),
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 4096,
            },
        )
        conn.initiate_connection()
        conn.increment_flow_control_window(CONNECTION_WINDOW - conn.inbound_flow_control_window)
        self.conn = conn

    def receive(self, data: bytes) -> None:
        assert self.conn is not None
        try:
            events = self.conn.receive_data(data)
            for event in events:
                if self.conn is not None:
                    self.on_event(event)
        except Exception:
            # A partial frame makes h2 raise many kinds of errors. The host's magic may be in these very bytes.
            self.lose()
            self.hunt(data)

    def lose(self) -> None:
        """Drops the link, and notifies the host."""
        self.drop_streams()
        self.conn = None
        self.hunting.begin()
        self.out[:] = HELLO

    def on_event(self, event: h2.events.Event) -> None:
        assert self.conn is not None
        if isinstance(event, h2.events.DataReceived):
            stream = self.by_id.get(event.stream_id)
            if stream is None:
                self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                return
            padding = event.flow_controlled_length - len(event.data)
            if padding:
                self.conn.acknowledge_received_data(padding, event.stream_id)
            stream.held += event.data
        elif isinstance(event, h2.events.RequestReceived):
            self.open(event.stream_id, dict(event.headers))
        elif isinstance(event, h2.events.StreamEnded):
            stream = self.by_id.get(event.stream_id)
            if stream is not None:
                stream.input_over = True
        elif isinstance(event, h2.events.StreamReset):
            stream = self.by_id.get(event.stream_id)
            if stream is not None:
                self.close(stream)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.lose()

    # Streams

    def open(self, stream_id: int, headers: dict[bytes, bytes]) -> None:
        assert self.conn is not None
        wanted = headers.get(b":method") == b"CONNECT" and headers.get(b":authority") == b"%d" % AGENT_PORT
        try:
            self.conn.send_headers(stream_id, [(":status", "200" if wanted else "404")], end_stream=not wanted)
        except h2.exceptions.ProtocolError:
            return  # the host has reset it already
        ends = _socketpair() if wanted and len(self.by_id) < MAX_STREAMS + RESERVED_STREAMS else None
        if ends is None:
            code = h2.errors.ErrorCodes.REFUSED_STREAM if wanted else h2.errors.ErrorCodes.NO_ERROR
            self.conn.reset_stream(stream_id, code)
            return
        ours, theirs = ends
        stream = self.by_id[stream_id] = self.by_fd[ours.fileno()] = _Stream(stream_id, ours)
        self.epoll.register(ours.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
        self.accepted.append((stream, theirs))

    def pass_accepted(self) -> None:
        """Passes new streams to the server, after the bytes that arrived with them, so that it waits for none of
        these."""
        if not self.accepted:
            return
        accepted, self.accepted = self.accepted, []
        for stream, theirs in accepted:
            try:
                self.serve(theirs)
            except Exception:
                theirs.close()
                if stream.id in self.by_id:
                    self.reset(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
        if not self.out:
            # The host does not wait for it, and a write to the port takes a guest without KVM a millisecond.
            self.together_until = time.monotonic() + _TOGETHER_S

    def to_server(self, stream: _Stream) -> None:
        """Writes received data, as far as the server reads it."""
        assert self.conn is not None
        try:
            while stream.held:
                count = stream.sock.send(stream.held)
                del stream.held[:count]
                self.conn.acknowledge_received_data(count, stream.id)
            if stream.input_over:
                stream.sock.shutdown(socket.SHUT_WR)
                stream.writable = False
                if stream.ended:
                    self.close(stream)
        except BlockingIOError:
            stream.writable = False
        except OSError:
            # The server reads no more, but may still send.
            self.conn.acknowledge_received_data(len(stream.held), stream.id)
            stream.held.clear()
            stream.writable = False

    def from_server(self, stream: _Stream) -> bool:
        """Sends one frame of the server's output; returns whether there may be more to send at once."""
        assert self.conn is not None
        if len(self.out) >= OUTPUT_HIGH:
            return False
        room = min(FRAME, self.conn.local_flow_control_window(stream.id))
        if room <= 0:
            return False  # the host's next window update wakes the loop
        try:
            data = stream.sock.recv(room)
        except BlockingIOError:
            stream.readable = False
            return False
        except OSError:
            self.reset(stream, h2.errors.ErrorCodes.CANCEL)
            return False
        self.together_until = 0.0
        if data:
            self.conn.send_data(stream.id, data)
            self.out += self.conn.data_to_send()
            return True
        stream.ended = True
        stream.readable = False
        self.conn.end_stream(stream.id)
        if stream.input_over and not stream.held:
            self.close(stream)
        return False

    def reset(self, stream: _Stream, code: h2.errors.ErrorCodes) -> None:
        assert self.conn is not None
        try:
            self.conn.reset_stream(stream.id, code)
        except h2.exceptions.StreamClosedError:
            pass
        self.close(stream)

    def close(self, stream: _Stream) -> None:
        del self.by_id[stream.id]
        del self.by_fd[stream.sock.fileno()]
        if stream.held and self.conn is not None:
            # Returns the bytes to the window of the connection.
            self.conn.acknowledge_received_data(len(stream.held), stream.id)
        stream.sock.close()

    def drop_streams(self) -> None:
        for _, theirs in self.accepted:
            theirs.close()
        self.accepted.clear()
        for stream in self.by_id.values():
            stream.sock.close()
        self.by_id.clear()
        self.by_fd.clear()


def _socketpair() -> tuple[socket.socket, socket.socket] | None:
    """Returns this end of a new stream and the server's, or None on failure."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    ours.setblocking(False)
    return ours, theirs
