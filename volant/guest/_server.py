"""The agent's server: takes byte streams, from wherever they come, and answers one request on each.

A thread for each stream, with blocking reads and one poll loop where two sides talk: there are at most 144 streams, so
an event loop would only cost its import. The bound has a reserve that only the daemon's own routes may use, so a flood
of relayed streams can't keep the daemon from asking how the guest is.
"""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import sys
import threading
import time

from volant import __version__
from volant.model import agent

from . import _root
from ._http import Gone, Problem, Stream, parse_request
from ._memory import memory
from ._output import Output
from ._plugin import Plugin
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


class Server:
    """Everything that the agent does for its clients."""

    def __init__(self, shut_down: Callable[[float], None]) -> None:
        """:param shut_down: begins the shutdown of the guest, with seconds of grace, and returns."""
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
        self._began = self._last = time.monotonic()
        self.answered = threading.Event()
        """Set when the first stream has been answered, or waits for the guest to be set up."""
        self.set_up = threading.Event()
        """Set when commands find all that they may expect: mounts, devices."""
        self.set_up.set()
        self._wanted = threading.Event()

    def serve(self, sock: socket) -> None:
        """Take a stream and answer it, in a thread of its own; never blocks. The socket belongs to the server now."""
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
        if full:
            _turn_away(sock)
            return
        try:
            threading.Thread(target=self._thread, args=(sock, reserved), name="stream", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._open -= 1
            _turn_away(sock)

    def wait_for_quiet(self, quiet_s: float, at_most_s: float) -> None:
        """Return when no stream has come for `quiet_s`, when one waits for `set_up`, or after `at_most_s`."""
        end = time.monotonic() + at_most_s
        while (left := min(self._last + quiet_s, end) - time.monotonic()) > 0:
            if self._wanted.wait(left):
                return

    def _wait_until_set_up(self) -> None:
        """What is not set up by then will not be; PID 1 has said why on the console."""
        if not self.set_up.is_set():
            self._wanted.set()
            self.answered.set()
            self.set_up.wait(_SET_UP_S)
        self.plugin.write()

    def statistics(self) -> dict[str, int]:
        """Return how many streams are open, were open at most, were served and were turned away."""
        with self._lock:
            return {
                "streams": self._open,
                "streams_most": self._most,
                "streams_served": self._served,
                "streams_refused": self._refused,
            }

    def _thread(self, sock: socket, reserved: bool) -> None:
        try:
            self._answer(Stream(sock), reserved)
        finally:
            sock.close()
            with self._lock:
                self._open -= 1

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
            _linger(stream)
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

            _relay.connect(stream, request, self.workload.comes)
        elif path == agent.HEALTHZ:
            _allow(method, "GET", "HEAD")
            self._answer_json(stream, self.healthz(), method)
        elif path.startswith(agent.WORKLOAD_PREFIX):
            self._forward(stream, request, request.target[len(agent.WORKLOAD_PREFIX) - 1 :])
        elif path.startswith(agent.AGENT_PREFIX):
            self._own(stream, request, path, method)
        else:
            self._forward(stream, request, request.target)

    def _own(self, stream: Stream, request: Request, path: str, method: str) -> None:
        if path == agent.INFO:
            _allow(method, "GET", "HEAD")
            self._answer_json(stream, self.info(), method)
        elif path == agent.EXEC:
            _allow(method, "POST", "GET")
            if method == "GET":
                self._serve_exec_websocket(stream, request)
            else:
                from . import _exec

                self._wait_for_root()
                _exec.handle(stream, request)
        elif path == agent.EXEC_SESSIONS or path.startswith(agent.EXEC_SESSIONS + "/"):
            self._serve_exec_sessions(stream, request, path[len(agent.EXEC_SESSIONS) + 1 :])
        elif path.startswith(agent.FILES):
            from . import _files

            self._wait_for_root()
            _files.handle(stream, request, path[len(agent.FILES) :])
        elif path == agent.DAEMON_WORKLOAD:
            _allow(method, "PUT", "GET", "HEAD")
            if method == "PUT":
                self._wait_until_set_up()
                _root.root()
                self.workload.serve_put(stream, request, self.plugin)
            else:
                self.workload.serve_status(stream, head_only=method == "HEAD")
        elif path == agent.DAEMON_MANIFEST:
            _allow(method, "PUT")
            self.plugin.serve_put(stream, request)
        elif path == agent.DAEMON_IDENTITY:
            _allow(method, "PUT")
            from . import _identity

            self._wait_for_root()
            _identity.serve_identity(stream, request, self.output, self.workload, self.plugin)
        elif path == agent.DAEMON_CLOCK:
            _allow(method, "PUT")
            from . import _identity

            _identity.serve_clock(stream, request)
        elif path == agent.DAEMON_HOSTS:
            _allow(method, "PUT")
            from . import _identity

            self._wait_for_root()
            _identity.serve_hosts(stream, request)
        elif path == agent.DAEMON_SETTLE:
            _allow(method, "POST")
            from . import _identity

            self._wait_for_root()
            _identity.settle()
            self._answer_json(stream, {}, method)
        elif path == agent.DAEMON_WATCH:
            _allow(method, "GET")
            self.workload.serve_watch(stream)
        elif path == agent.DAEMON_LOGS:
            _allow(method, "GET")
            self.output.serve(stream, request)
        elif path == agent.DAEMON_ROOT:
            _allow(method, "GET", "HEAD")
            self._wait_until_set_up()
            state, detail = _root.state()
            self._answer_json(stream, {"state": state, "detail": detail}, method)
        elif path == agent.DAEMON_SHUTDOWN:
            _allow(method, "POST")
            self._serve_shutdown(stream, request)
        else:
            raise Problem(404, f"the agent has no {path[:200]}")

    def _wait_for_root(self) -> None:
        """:raises Problem: 503, it is not there."""
        self._wait_until_set_up()
        _root.root()

    def _serve_exec_websocket(self, stream: Stream, request: Request) -> None:
        from ._websocket import is_upgrade

        if not is_upgrade(request):
            text = "this is a WebSocket, for commands that are talked to"
            raise Problem(426, text, hint="without one: POST", headers=[("Upgrade", "websocket")])
        self._exec_sessions().serve_websocket(stream, request, self._wait_for_root)

    def _serve_exec_sessions(self, stream: Stream, request: Request, identifier: str) -> None:
        method = request.method
        if not identifier:
            _allow(method, "GET", "HEAD")
            self._answer_json(stream, {"sessions": self._exec_sessions().list()}, method)
            return
        _allow(method, "GET", "HEAD", "DELETE")
        if method == "DELETE":
            self._exec_sessions().end(identifier)
            stream.start(204, ())
        else:
            self._answer_json(stream, self._exec_sessions().get(identifier), method)

    def _exec_sessions(self) -> Sessions:
        with self._lock:
            if self._sessions is None:
                from ._exec_sessions import Sessions

                self._sessions = Sessions()
            return self._sessions

    def _forward(self, stream: Stream, request: Request, target: str) -> None:
        port = self.workload.port
        if port is None:
            raise Problem(404, "this guest has no workload that serves HTTP")
        from . import _relay

        _relay.forward(stream, request, target, port, self.workload.comes)

    def _serve_shutdown(self, stream: Stream, request: Request) -> None:
        from ._exec import check_number, decode_json

        body = stream.read_body(request)
        value = decode_json(body, {"grace_s"}) if body else {}
        grace = check_number(value.get("grace_s", agent.DEFAULT_GRACE_S), "grace_s", 0, agent.MAX_GRACE_S)
        self._answer_json(stream, {"state": "stopping", "grace_s": grace}, "POST", status=202)
        self._shut_down(grace)

    def _answer_json(self, stream: Stream, value: object, method: str, *, status: int = 200) -> None:
        import json

        stream.answer(status, json.dumps(value).encode() + b"\n", head_only=method == "HEAD")

    def healthz(self) -> dict[str, object]:
        """Return an `agent_types.Healthz`."""
        return {
            "status": "ok",
            "protocol": agent.PROTOCOL_VERSION,
            "agent": __version__,
            "uptime_s": round(time.monotonic() - self._began, 3),
            "workload": self.workload.status(),
        }

    def info(self) -> dict[str, object]:
        """Return an `agent_types.Info`."""
        from ._identity import instance_id

        system = os.uname()
        found: dict[str, object] = {
            "agent": __version__,
            "protocol": {"min": agent.PROTOCOL_MIN, "max": agent.PROTOCOL_VERSION},
            "kernel": system.release,
            "hostname": system.nodename,
            # Made by the kernel when it is first read, so nobody may ask for it in a guest that becomes a template.
            "boot_id": _first_line("/proc/sys/kernel/random/boot_id"),
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


def _is_for_daemon(path: str) -> bool:
    return path == agent.HEALTHZ or path.startswith(agent.DAEMON_PREFIX)


def _too_many() -> Problem:
    text = f"{agent.MAX_STREAMS} streams are open already"
    return Problem(503, text, headers=[("Retry-After", "1")])


def _turn_away(sock: socket) -> None:
    """Say 503 without waiting for anything, not even for the request."""
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


def _allow(method: str, *methods: str) -> None:
    if method not in methods:
        raise Problem(405, f"not with {method[:32]}", headers=[("Allow", ", ".join(methods))])


def _linger(stream: Stream) -> None:
    """Say that the answer is complete, and let the client read it before the socket goes.

    Closing a socket that has unread bytes resets it, and the answer may be lost with it.
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


def _first_line(path: str) -> str:
    try:
        with open(path) as handle:
            return handle.readline(256).strip()
    except OSError:
        return ""
