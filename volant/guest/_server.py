"""The agent's server: receives byte streams from the transport, and answers one request on each.

Each stream has a thread, with blocking reads, and one poll loop where it talks to two sides. There are at most 144
streams, so an event loop would only cost the time to import it. 16 of them are reserved for the daemon's own routes: a
flood of relayed streams can't prevent the daemon from checking the guest.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from volant import __version__
from volant.model import agent

from . import _root
from ._http import Gone, Problem, parse_request
from ._output import Output
from ._plugin import Plugin
from ._stream import Stream
from ._system import memory, read_text
from ._watch import has_left
from ._workload import Workload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from ._exec_sessions import Sessions
    from ._http import Request

_LINGER_S = 2.0
_SET_UP_S = 15.0
_MAX_LEFTOVER = 8 * 1024 * 1024
_SPARE_THREADS = 2
"""Threads that wait for a stream. Starting one takes a guest without KVM one to four milliseconds."""


class Server:
    """Routes requests, counts streams, and holds the state of the agent."""

    def __init__(self, shut_down: Callable[[float], None]) -> None:
        """Creates it. `shut_down` begins the shutdown of the guest, with a grace period in seconds, and returns."""
        self.output = Output()
        self.workload = Workload(self.output)
        self.plugin = Plugin()
        self._shut_down = shut_down
        self._lock = threading.Lock()
        self._sessions: Sessions | None = None
        self._open = 0
        self._most = 0
        self._served = 0
        self._refused = 0
        self._spare: list[_Spare] = []
        self._began = self._last = time.monotonic()
        self.answered = threading.Event()
        """Set once the first stream was answered, or waits for `set_up`."""
        self.set_up = threading.Event()
        """Set once the guest has all its mounts and devices."""
        self.set_up.set()
        self._wanted = threading.Event()
        self._routes: dict[str, tuple[tuple[str, ...], Callable[[Stream, Request], None]]] = {
            agent.INFO: (("GET", "HEAD"), self._serve_info),
            agent.EXEC: (("POST", "GET"), self._serve_exec),
            agent.DAEMON_WORKLOAD: (("PUT", "GET", "HEAD"), self._serve_workload),
            agent.DAEMON_MANIFEST: (("PUT",), self.plugin.serve_put),
            agent.DAEMON_IDENTITY: (("PUT",), self._serve_identity),
            agent.DAEMON_CLOCK: (("PUT",), self._serve_clock),
            agent.DAEMON_HOSTS: (("PUT",), self._serve_hosts),
            agent.DAEMON_VOLUMES: (("PUT",), self._serve_volumes),
            agent.DAEMON_SECRETS: (("PUT", "GET"), self._serve_secrets),
            agent.DAEMON_SETTLE: (("POST",), self._serve_settle),
            agent.DAEMON_WATCH: (("GET",), self.workload.serve_watch),
            agent.DAEMON_LOGS: (("GET",), self.output.serve),
            agent.DAEMON_ROOT: (("GET", "HEAD"), self._serve_root),
            agent.DAEMON_SHUTDOWN: (("POST",), self._serve_shutdown),
        }

    def serve(self, sock: socket) -> None:
        """Answers a stream in a thread, and closes it; never blocks."""
        with self._lock:
            full = self._open >= agent.MAX_STREAMS + agent.RESERVED_STREAMS
            reserved = self._open >= agent.MAX_STREAMS
            if full:
                self._refused += 1
            else:
                self._open += 1
                self._most = max(self._most, self._open)
                self._served += 1
            self._last = time.monotonic()
            spare = self._spare.pop() if self._spare and not full else None
        if full:
            _refuse(sock)
            return
        if spare is not None:
            spare.give(sock, reserved)
            return
        try:
            threading.Thread(target=self._thread, args=(sock, reserved), name="stream", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._open -= 1
            _refuse(sock)

    def wait_for_quiet(self, quiet_s: float, at_most_s: float) -> None:
        """Waits until no stream has arrived for `quiet_s`, one waits for `set_up`, or `at_most_s` have passed."""
        end = time.monotonic() + at_most_s
        while (left := min(self._last + quiet_s, end) - time.monotonic()) > 0:
            if self._wanted.wait(left):
                return

    def _is_set_up(self) -> bool:
        """Waits for `set_up`, at most 15 s, and returns whether it is set."""
        if not self.set_up.is_set():
            self._wanted.set()
            self.answered.set()
            if not self.set_up.wait(_SET_UP_S):
                return False
        self.plugin.write()
        return True

    def statistics(self) -> dict[str, int]:
        """Returns the number of streams that are open, were open at most, were served and were refused."""
        with self._lock:
            return {
                "streams": self._open,
                "streams_most": self._most,
                "streams_served": self._served,
                "streams_refused": self._refused,
            }

    def _thread(self, sock: socket, reserved: bool) -> None:
        while True:
            try:
                self._answer(Stream(sock), reserved)
            finally:
                sock.close()
                with self._lock:
                    self._open -= 1
            with self._lock:
                if len(self._spare) >= _SPARE_THREADS:
                    return
                spare = _Spare()
                self._spare.append(spare)
            sock, reserved = spare.wait()

    def _answer(self, stream: Stream, reserved: bool) -> None:
        try:
            try:
                request = parse_request(stream.read_head())
                if reserved and not _is_for_daemon(request.path):
                    raise _too_many()
                self._route(stream, request)
            except Problem as problem:
                self._answer_problem(stream, problem)
            except Gone:
                raise
            except Exception as error:
                sys.excepthook(*sys.exc_info())
                text = f"the agent has a bug: {type(error).__name__}: {error}"
                self._answer_problem(stream, Problem(500, text[:500]))
            self.answered.set()
            _wait_for_close(stream)
        except (Gone, OSError):
            pass

    def _answer_problem(self, stream: Stream, problem: Problem) -> None:
        if stream.answered:
            return
        stream.answer(problem.status, problem.body(), "application/problem+json", problem.headers)

    def _route(self, stream: Stream, request: Request) -> None:
        path, method = request.path, request.method
        if method == "CONNECT":
            from . import _relay

            _relay.connect(stream, request, self.workload.is_starting_at)
        elif path == agent.HEALTHZ:
            _allow(method, "GET", "HEAD")
            _answer_json(stream, request, self.healthz())
        elif path.startswith(agent.WORKLOAD_PREFIX):
            self._forward(stream, request, request.target[len(agent.WORKLOAD_PREFIX) - 1 :])
        elif path.startswith(agent.AGENT_PREFIX):
            self._route_own(stream, request)
        else:
            self._forward(stream, request, request.target)

    def _route_own(self, stream: Stream, request: Request) -> None:
        path = request.path
        if path in self._routes:
            methods, handler = self._routes[path]
            _allow(request.method, *methods)
            handler(stream, request)
        elif path == agent.EXEC_SESSIONS or path.startswith(agent.EXEC_SESSIONS + "/"):
            self._serve_exec_sessions(stream, request, path[len(agent.EXEC_SESSIONS) + 1 :])
        elif path.startswith(agent.FILES):
            from . import _files

            self._wait_for_root()
            _files.handle(stream, request, path[len(agent.FILES) :])
        else:
            raise Problem(404, f"the agent has no {path[:200]}")

    def _wait_for_root(self) -> None:
        """Waits for the setup. :raises Problem: 503, it is not done, or there is no root filesystem."""
        if not self._is_set_up():
            raise Problem(503, "the guest is not set up yet", headers=[("Retry-After", "1")])
        _root.root()

    def _serve_info(self, stream: Stream, request: Request) -> None:
        _answer_json(stream, request, self.info())

    def _serve_exec(self, stream: Stream, request: Request) -> None:
        if request.method == "POST":
            from . import _exec

            self._wait_for_root()
            _exec.handle(stream, request, self.plugin.exec_defaults())
            return
        from ._websocket import is_upgrade

        if not is_upgrade(request):
            text = "this is a WebSocket, for commands that are talked to"
            raise Problem(426, text, hint="without one: POST", headers=[("Upgrade", "websocket")])
        self._exec_sessions().serve_websocket(stream, request, self._wait_for_root, self.plugin.exec_defaults())

    def _serve_workload(self, stream: Stream, request: Request) -> None:
        if request.method == "PUT":
            self._wait_for_root()
            self.workload.serve_put(stream, request, self.plugin)
        else:
            _answer_json(stream, request, self.workload.status())

    def _serve_identity(self, stream: Stream, request: Request) -> None:
        from . import _identity

        # No 503, which means that the workload is not healthy. Without an answer the daemon sends a newer identity.
        if not self._is_set_up() or has_left(stream.sock):
            raise Gone
        _root.root()
        _identity.serve_identity(stream, request, self.output, self.workload, self.plugin)

    def _serve_clock(self, stream: Stream, request: Request) -> None:
        from . import _identity

        _identity.serve_clock(stream, request)

    def _serve_hosts(self, stream: Stream, request: Request) -> None:
        from . import _identity

        self._wait_for_root()
        _identity.serve_hosts(stream, request)

    def _serve_volumes(self, stream: Stream, request: Request) -> None:
        from . import _volumes

        self._wait_for_root()
        _volumes.serve_put(stream, request)

    def _serve_secrets(self, stream: Stream, request: Request) -> None:
        from . import _secrets

        if request.method == "PUT":
            self._wait_for_root()
        _secrets.serve(stream, request, self.plugin)

    def _serve_settle(self, stream: Stream, request: Request) -> None:
        from . import _identity

        self._wait_for_root()
        _identity.settle()
        _answer_json(stream, request, {})

    def _serve_root(self, stream: Stream, request: Request) -> None:
        state, detail = _root.state() if self._is_set_up() else ("pending", "")
        _answer_json(stream, request, {"state": state, "detail": detail})

    def _serve_exec_sessions(self, stream: Stream, request: Request, identifier: str) -> None:
        method = request.method
        if not identifier:
            _allow(method, "GET", "HEAD")
            _answer_json(stream, request, {"sessions": self._exec_sessions().list()})
            return
        _allow(method, "GET", "HEAD", "DELETE")
        if method == "DELETE":
            self._exec_sessions().end(identifier)
            stream.start(204, ())
        else:
            _answer_json(stream, request, self._exec_sessions().get(identifier))

    def _exec_sessions(self) -> Sessions:
        with self._lock:
            if self._sessions is None:
                from ._exec_sessions import Sessions

                self._sessions = Sessions(self.workload)
            return self._sessions

    def _forward(self, stream: Stream, request: Request, target: str) -> None:
        port = self.workload.port
        if port is None:
            raise Problem(404, "this guest has no workload that serves HTTP")
        from . import _relay

        _relay.forward(stream, request, target, port, self.workload.is_starting_at)

    def _serve_shutdown(self, stream: Stream, request: Request) -> None:
        from ._checks import check_number, decode_json

        body = stream.read_body(request)
        value = decode_json(body, {"grace_s"}) if body else {}
        grace = check_number(value.get("grace_s", agent.DEFAULT_GRACE_S), "grace_s", 0, agent.MAX_GRACE_S)
        _answer_json(stream, request, {"state": "stopping", "grace_s": grace}, status=202)
        self._shut_down(grace)

    def healthz(self) -> dict[str, object]:
        """Returns an `agent_types.Healthz`."""
        return {
            "status": "ok",
            "protocol": agent.PROTOCOL_VERSION,
            "agent": __version__,
            "uptime_s": round(time.monotonic() - self._began, 3),
            "workload": self.workload.status(),
        }

    def info(self) -> dict[str, object]:
        """Returns an `agent_types.Info`."""
        from ._identity import instance_id

        system = os.uname()
        found: dict[str, object] = {
            "agent": __version__,
            "protocol": {"min": agent.PROTOCOL_MIN, "max": agent.PROTOCOL_VERSION},
            "kernel": system.release,
            "hostname": system.nodename,
            # The kernel makes it at the first read. So it must not be read in a guest that becomes a template.
            "boot_id": read_text("/proc/sys/kernel/random/boot_id"),
            "instance_id": instance_id(),
            "uptime_s": round(time.clock_gettime(time.CLOCK_BOOTTIME), 3),
            "cpus": os.cpu_count() or 1,
            "memory": memory(),
            "disk": _root.figures(),
            "workload": self.workload.status(),
            "output": self.output.statistics(),
            "streams": self.statistics(),
        }
        plugin = self.plugin.info()
        if plugin is not None:
            found["plugin"] = plugin
        return found


class _Spare:
    """A thread without a stream."""

    def __init__(self) -> None:
        self._given: list[tuple[socket, bool]] = []
        self._lock = threading.Lock()
        self._lock.acquire()

    def give(self, sock: socket, reserved: bool) -> None:
        """Gives a stream to the thread, once."""
        self._given.append((sock, reserved))
        self._lock.release()

    def wait(self) -> tuple[socket, bool]:
        """Returns the stream given to the thread; runs in the thread."""
        self._lock.acquire()
        return self._given[0]


def _is_for_daemon(path: str) -> bool:
    return path == agent.HEALTHZ or path.startswith(agent.DAEMON_PREFIX)


def _too_many() -> Problem:
    text = f"{agent.MAX_STREAMS} streams are open already"
    return Problem(503, text, headers=[("Retry-After", "1")])


def _refuse(sock: socket) -> None:
    """Answers 503 and closes, without waiting for the request."""
    try:
        body = _too_many().body()
        sock.setblocking(False)
        sock.send(
            b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
            b"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    except OSError:
        pass
    finally:
        sock.close()


def _answer_json(stream: Stream, request: Request, value: object, *, status: int = 200) -> None:
    import json

    stream.answer(status, json.dumps(value).encode() + b"\n", head_only=request.method == "HEAD")


def _allow(method: str, *methods: str) -> None:
    if method not in methods:
        raise Problem(405, f"not with {method[:32]}", headers=[("Allow", ", ".join(methods))])


def _wait_for_close(stream: Stream) -> None:
    """Ends the answer, and waits at most 2 s until the client closes.

    Closing a socket with unread bytes resets the connection, so the client may lose the answer.
    """
    import socket

    end = time.monotonic() + _LINGER_S
    try:
        stream.sock.setblocking(True)
        stream.sock.shutdown(socket.SHUT_WR)
        dropped = 0
        while dropped < _MAX_LEFTOVER and (left := end - time.monotonic()) > 0:
            stream.sock.settimeout(left)
            data = stream.sock.recv(64 * 1024)
            if not data:
                return
            dropped += len(data)
    except OSError:
        pass
