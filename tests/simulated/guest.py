"""A simulated guest: the agent at the other end of the channel, and a workload that writes numbered lines.

It speaks the protocol of a real guest: it hunts for the host's request for a resync, then speaks HTTP/2, and HTTP/1.1
in each stream. So the daemon's own channel and client run against it. Fault sites make it misbehave.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h11
import trio

from actors import fault
from volant.guest._mux import HELLO, Hunt
from volant.model.agent import (
    DAEMON_CLOCK,
    DAEMON_HOSTS,
    DAEMON_IDENTITY,
    DAEMON_LOGS,
    DAEMON_MANIFEST,
    DAEMON_ROOT,
    DAEMON_SECRETS,
    DAEMON_SETTLE,
    DAEMON_SHUTDOWN,
    DAEMON_VOLUMES,
    DAEMON_WATCH,
    DAEMON_WORKLOAD,
    FRAME_STDOUT,
    HEALTHZ,
    IDENTITY_AS_IT_IS_SINCE,
    IDENTITY_NETWORK_SINCE,
    IDENTITY_WORKLOAD_SINCE,
    INFO,
    LOG_CONTENT_TYPE,
    LOG_ID_HEADER,
    PROTOCOL_MIN,
    PROTOCOL_VERSION,
    SECRETS_SINCE,
    VOLUMES_SINCE,
    encode_log_frame,
)

MISSING_PROGRAM = "nosuch"
"""The one program that the guest's root does not have."""
ENDS = {"ends": {"state": "exited", "exit_code": 0}, "fails": {"state": "failed", "exit_code": 3}}
"""Programs that end after some lines, and how. The others run for ever."""
CLIENT_S = 60.0
"""How long a workload waits for its client."""
_LAST_LINE = 2
_WINDOW = 2**24
_PIECE = 8192


class SimGuest:
    """The guest in one boot of a machine."""

    way_s = 0.0
    """Delay of each answer, as on a busy host."""

    def __init__(self, rng: Random, wall_clock_ns: Callable[[], int], power_off: Callable[[], None]) -> None:
        self.up = trio.Event()
        """Set while the agent answers."""
        self.workload: Any = None
        self.attached = False
        """Whether a client has attached to a workload that waits for one."""
        self._waits_since: float | None = None
        self.is_healthy = True
        """Whether the workload is healthy while it runs."""
        self.signals: list[str | None] = []
        """What each identity that it received sends to a copied workload."""
        self.served: Counter[tuple[str, str]] = Counter()
        """How often each request came, by method and path."""
        self.flickers = False
        """Whether each report says that the workload was restarted."""
        self._reports = 0
        self._end: dict[str, Any] | None = None
        """How the workload has ended."""
        self.lines = 0
        """Number of lines that the workload has written."""
        self.protocol = rng.randint(PROTOCOL_MIN, PROTOCOL_VERSION)
        """The newest protocol version of its agent."""
        self.root = "none"
        """The state of its root filesystem."""
        self.root_detail = ""
        """Why it can't mount it."""
        self.volumes: list[dict[str, Any]] = []
        """The volumes that it has mounted."""
        self.secrets: dict[str, Any] = {}
        """The values of secrets that it was sent last."""
        self.is_copy = False
        """Whether it has not received its identity since it was restored from a template."""
        self.hosts: dict[str, str] = {}
        """Its hosts entries."""
        self.network: dict[str, Any] | None = None
        """The settings of its NIC that it has received."""
        self._asked_to_stop = trio.Event()
        self.when_asked_to_stop: Callable[[_Stream], Awaitable[None]] = self._shut_down
        """Answers a request to shut down. Tests set other behaviour."""
        self._rng = rng
        self._wall_clock_ns = wall_clock_ns
        self._power_off = power_off
        self._log_id = f"{rng.getrandbits(64):016x}"
        self._stdout = bytearray()
        self._written = trio.Event()
        self.clock_set_at: list[float] = []
        """When its clock was set or measured."""
        self._reader: trio.CancelScope | None = None
        self._workload_news = trio.Event()
        self._going_down = False
        self._running = trio.Event()
        self._running.set()

    def pause(self) -> None:
        """Stops its processors."""
        if self._running.is_set():
            self._running = trio.Event()

    def resume(self) -> None:
        """Continues its processors."""
        self._running.set()

    async def wait_running(self) -> None:
        """Waits until its processors run."""
        while not self._running.is_set():
            await self._running.wait()

    async def run_workload(self) -> None:
        """Writes a line every few seconds, once there is a workload, until cancelled."""
        while True:
            await trio.sleep(self._rng.uniform(0.5, 5.0))
            await self.wait_running()
            if self.workload is None or self._going_down or self._end is not None:
                continue
            program = self.workload["entrypoint"][0]
            if self.workload.get("attach") and not self.attached:
                self._await_client()
                continue
            if program == MISSING_PROGRAM:
                continue
            if program in ENDS and self.lines >= _LAST_LINE:
                self._end = ENDS[program]
                self.workload_changes()
                continue
            self._stdout += b"line %d\n" % self.lines
            self.lines += 1
            self._written.set()
            self._written = trio.Event()

    def _await_client(self) -> None:
        """Has a client attach sooner or later, if one comes at all."""
        if self._waits_since is None:
            self._waits_since = trio.current_time()
        if self._rng.random() < 0.5 and not fault("client.stays_away"):
            self.attached = True
        elif trio.current_time() - self._waits_since > CLIENT_S:
            self._end = {"state": "failed", "error": "no client has attached to it"}
        else:
            return
        self.workload_changes()

    def restart_agent(self) -> None:
        """Restarts the agent: its state is lost, and positions begin at 0."""
        self.workload = self._end = self._waits_since = None
        self.attached = False
        self.secrets = {}
        self._log_id = f"{self._rng.getrandbits(64):016x}"
        self._stdout.clear()
        self.lines = 0

    async def serve(self, method: str, target: str, body: bytes, stream: _Stream) -> None:
        """Serves one request."""
        path = target.partition("?")[0]
        self.served[method, path] += 1
        await trio.sleep(self.way_s)
        await self.wait_running()
        if fault("agent.slow"):
            await trio.sleep(self._rng.uniform(1.0, 30.0))
        if fault("agent.refuses"):
            await answer(stream, 500, {"detail": "the agent has a bad day"})
        elif path == DAEMON_IDENTITY and "network" in json.loads(body) and self.protocol < IDENTITY_NETWORK_SINCE:
            await answer(stream, 400, {"detail": "the body has other fields than an agent of this age knows"})
        elif path == DAEMON_IDENTITY:
            wanted = json.loads(body)
            assert len(wanted["entropy"]) >= 64
            assert "manifest" not in wanted or self.protocol >= IDENTITY_WORKLOAD_SINCE
            assert "as_it_is" not in wanted or self.protocol >= IDENTITY_AS_IT_IS_SINCE
            self.is_copy = False
            self.signals.append(wanted.get("signal"))
            if "network" in wanted:
                self.network = wanted["network"]
                self.hosts = wanted["network"].get("hosts", {})
            self.workload = wanted.get("workload", self.workload)
            self.workload_changes()
            self._log_id = f"{self._rng.getrandbits(64):016x}"
            said = {"protocol": {"min": PROTOCOL_MIN, "max": self.protocol}, "time_ns": wanted["time_ns"]}
            await answer(stream, 200, said)
        elif path == DAEMON_CLOCK:
            self.clock_set_at.append(trio.current_time())
            await answer(stream, 200, {"time_ns": json.loads(body).get("time_ns", self._wall_clock_ns())})
        elif path == DAEMON_HOSTS and self.protocol >= IDENTITY_NETWORK_SINCE:
            assert not self.is_copy
            refuses = fault("agent.refuses_hosts")
            if not refuses:
                self.hosts = json.loads(body)["hosts"]
            await answer(stream, 500 if refuses else 200, {})
        elif path == DAEMON_VOLUMES and self.protocol >= VOLUMES_SINCE:
            assert not self.is_copy
            refuses = fault("agent.can_not_mount")
            if not refuses:
                self.volumes = json.loads(body)["volumes"]
            await answer(stream, 409 if refuses else 200, {"detail": "the volume holds no sound ext4 filesystem"})
        elif path == DAEMON_SECRETS and self.protocol >= SECRETS_SINCE:
            if method == "PUT":
                self.secrets = json.loads(body)
            await answer(stream, 200, {"boot": self.secrets.get("boot")})
        elif path == DAEMON_SETTLE:
            await answer(stream, 200, {})
        elif path in (DAEMON_MANIFEST, DAEMON_WORKLOAD, DAEMON_LOGS) and self.is_copy:
            raise AssertionError(f"{path} was requested before the clone received its identity")
        elif path == HEALTHZ:
            await answer(stream, 200, {"status": "ok", "protocol": self.protocol})
        elif path == INFO:
            await answer(stream, 200, {"protocol": {"min": PROTOCOL_MIN, "max": self.protocol}})
        elif path == DAEMON_ROOT:
            await answer(stream, 200, {"state": self.root, "detail": self.root_detail})
        elif (method, path) == ("PUT", DAEMON_MANIFEST) and self.protocol >= IDENTITY_WORKLOAD_SINCE:
            await answer(stream, 200, {})
        elif (method, path) == ("PUT", DAEMON_WORKLOAD):
            given = json.loads(body)
            fits = self.workload in (None, given)
            if fits:
                self.workload = given
                self.workload_changes()
            await answer(stream, 200 if fits else 409, {"state": "running"})
        elif (method, path) == ("GET", DAEMON_WORKLOAD):
            await answer(stream, 200, self._workload_status())
        elif (method, path) == ("POST", DAEMON_SHUTDOWN):
            await self.when_asked_to_stop(stream)
        elif path == DAEMON_LOGS:
            await self._follow(target, stream)
        elif path == DAEMON_WATCH:
            await self._watch(stream)
        else:
            await answer(stream, 404, {"detail": "there is no such route"})

    async def _watch(self, stream: _Stream) -> None:
        """Reports the state of the workload, now and at each change."""
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n")
        while True:
            news = self._workload_news
            self._reports += self.flickers and self.workload is not None
            status = self._workload_status()
            await stream.send_all(json.dumps(status).encode() + b"\n")
            await news.wait()

    def _workload_status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"state": "none", "pid": None, "restarts": 0}
        if self._end is not None:
            return status | self._end
        if self.workload is None:
            return status
        if self.workload.get("attach") and not self.attached:
            return status | {"state": "starting", "error": "it waits for a client"}
        if self.workload["entrypoint"][0] == MISSING_PROGRAM:
            return status | {"state": "failed", "error": f"there is no program {MISSING_PROGRAM}"}
        state = "healthy" if self.is_healthy else "starting"
        return status | {"state": state, "pid": 1000, "restarts": self._reports}

    def workload_changes(self) -> None:
        """Wakes the watchers of the workload."""
        news, self._workload_news = self._workload_news, trio.Event()
        news.set()

    async def _shut_down(self, stream: _Stream) -> None:
        await answer(stream, 202, {})
        if not fault("guest.ignores_shutdown"):
            self._going_down = True
            self._asked_to_stop.set()

    async def go_down(self) -> None:
        """Powers the guest off once it was asked to, whether or not the client stays."""
        await self._asked_to_stop.wait()
        await trio.sleep(self._rng.uniform(0.05, 3.0))
        await self.wait_running()
        self._power_off()

    async def _follow(self, target: str, stream: _Stream) -> None:
        query = dict(pair.partition("=")[::2] for pair in target.partition("?")[2].split("&"))
        position = min(int(query.get("stdout", 0)), len(self._stdout))
        if self._reader is not None:
            self._reader.cancel()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {LOG_CONTENT_TYPE}\r\n{LOG_ID_HEADER}: {self._log_id}\r\n"
        await stream.send_all(f"{head}Connection: close\r\n\r\n".encode())
        with trio.CancelScope() as self._reader:
            while True:
                # Cut anywhere, as a pipe is.
                while data := bytes(self._stdout[position : position + self._rng.randint(1, 40)]):
                    await stream.send_all(encode_log_frame(FRAME_STDOUT, position, self._wall_clock_ns(), data))
                    position += len(data)
                await self._written.wait()


async def answer(stream: _Stream, status: int, body: object) -> None:
    """Sends a JSON answer and ends the stream."""
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    await stream.send_all(f"{head}Connection: close\r\n\r\n".encode() + data)


class _Stream:
    """One stream of HTTP/2, from the guest's side."""

    def __init__(self, port: SimPort, stream_id: int) -> None:
        self._port = port
        self.id = stream_id
        self.received = bytearray()
        self.input_over = False
        self.broken = False
        self.wake = trio.Event()

    def poke(self) -> None:
        self.wake.set()
        self.wake = trio.Event()

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self.received:
            if self.broken:
                raise trio.BrokenResourceError
            if self.input_over:
                return b""
            await self.wake.wait()
        data = bytes(self.received)
        self.received.clear()
        return data

    async def send_all(self, data: bytes) -> None:
        while data:
            if self.broken:
                raise trio.BrokenResourceError
            room = min(self._port.window(self.id), _PIECE)
            if room <= 0:
                await self.wake.wait()
                continue
            await self._port.send(self.id, data[:room])
            data = data[room:]


class SimPort:
    """The guest's end of the virtio-serial port while one host is connected to it."""

    def __init__(self, guest: SimGuest, stream: trio.abc.Stream) -> None:
        self._guest = guest
        self._stream = stream
        self._sending = trio.Lock()
        self._conn: h2.connection.H2Connection | None = None
        self._streams: dict[int, _Stream] = {}
        self._hunting = Hunt()

    async def run(self) -> None:
        """Serves until the host disconnects."""
        try:
            await self._guest.up.wait()
            await self._guest.wait_running()
            await self._stream.send_all(HELLO)
            async with trio.open_nursery() as nursery:
                while data := await self._stream.receive_some(65536):
                    await self._guest.wait_running()
                    await self._receive(bytes(data), nursery)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def window(self, stream_id: int) -> int:
        assert self._conn is not None
        return int(self._conn.local_flow_control_window(stream_id))

    async def send(self, stream_id: int, data: bytes) -> None:
        await self._guest.wait_running()
        assert self._conn is not None
        if fault("channel.garbage"):
            # The host must resync.
            async with self._sending:
                await self._stream.send_all(b"\xff" * 64)
        self._conn.send_data(stream_id, data)
        await self._flush()

    async def _flush(self) -> None:
        async with self._sending:
            if self._conn is not None and (data := self._conn.data_to_send()):
                await self._stream.send_all(data)

    async def _receive(self, data: bytes, nursery: trio.Nursery) -> None:
        if self._conn is None:
            await self._hunt(data, nursery)
            return
        try:
            for event in self._conn.receive_data(data):
                self._on_event(event, nursery)
        except (h2.exceptions.ProtocolError, ValueError, KeyError, IndexError):
            await self._lose()
            await self._hunt(data, nursery)
            return
        await self._flush()

    async def _lose(self) -> None:
        for stream in self._streams.values():
            stream.broken = True
            stream.poke()
        self._streams.clear()
        self._conn = None
        self._hunting.begin()
        async with self._sending:
            await self._stream.send_all(HELLO)

    async def _hunt(self, data: bytes, nursery: trio.Nursery) -> None:
        answers, start = self._hunting.feed(data)
        if answers:
            async with self._sending:
                await self._stream.send_all(answers)
        if start:
            self._begin()
            await self._receive(start, nursery)

    def _begin(self) -> None:
        self._conn = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
        )
        self._conn.initiate_connection()
        self._conn.increment_flow_control_window(_WINDOW)

    def _on_event(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        assert self._conn is not None
        match event:
            case h2.events.RequestReceived():
                stream = self._streams[event.stream_id] = _Stream(self, event.stream_id)
                self._conn.send_headers(event.stream_id, [(":status", "200")])
                nursery.start_soon(self._serve, stream)
            case h2.events.DataReceived():
                self._conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if found := self._streams.get(event.stream_id):
                    found.received += event.data
                    found.poke()
            case h2.events.StreamEnded():
                if found := self._streams.get(event.stream_id):
                    found.input_over = True
                    found.poke()
            case h2.events.StreamReset():
                if found := self._streams.pop(event.stream_id, None):
                    found.broken = True
                    found.poke()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for other in self._streams.values():
                    other.poke()

    async def _serve(self, stream: _Stream) -> None:
        conn = self._conn
        with trio.CancelScope() as scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, stream, scope)
                    await self._answer(stream)
                    nursery.cancel_scope.cancel()
            except* (trio.BrokenResourceError, h11.RemoteProtocolError, h2.exceptions.ProtocolError):
                pass
        if conn is not None and conn is self._conn and self._streams.pop(stream.id, None) is not None:
            try:
                conn.end_stream(stream.id)
                await self._flush()
            except h2.exceptions.ProtocolError:
                pass

    async def _watch(self, stream: _Stream, scope: trio.CancelScope) -> None:
        """Cancels the answer once the host has reset the stream."""
        while not stream.broken:
            await stream.wake.wait()
        scope.cancel()

    async def _answer(self, stream: _Stream) -> None:
        parser = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                break
            else:
                return
        await self._guest.serve(request.method.decode(), request.target.decode(), body, stream)
