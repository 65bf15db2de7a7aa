"""The workload: the one program that a guest is there for. Started, watched, checked and started anew.

The two pipes that it writes to live as long as the agent, so runs share them and two pump threads are enough. When a
run has ended, what is left of its process group is killed before the next begins: a forgotten child would keep the
port.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from volant.model import agent

from ._exec import (
    SpawnError,
    base_environment,
    check_directory,
    check_environment,
    check_number,
    check_object,
    check_strings,
    decode_json,
    how_it_ended,
    kill_group,
    spawn,
)
from ._http import Problem, chunk
from ._watch import Bell, Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from ._http import Request, Stream
    from ._output import Output
    from ._plugin import Plugin

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_WELL_S = 60.0
_STARTING_CHECK_S = 0.5
_COPIED_CHECK_S = 0.05
_READ = 64 * 1024
_MAX_WATCHERS = 8
_FIELDS = {"entrypoint", "env", "workdir", "port", "restart", "health_check"}
_CHECK_FIELDS = {"path", "port", "command", "interval_s", "timeout_s", "retries"}
_POLICIES = ("never", "on-failure", "always")


class HealthCheck:
    """How to find out whether the workload is well."""

    def __init__(self, value: object, port: int | None) -> None:
        """:raises Problem: 400, a field is wrong."""
        field = "health_check"
        if not isinstance(value, dict):
            raise Problem(400, f"{field} is no object", field=field)
        for name in value:
            if name not in _CHECK_FIELDS:
                raise Problem(400, f"unknown field {field}.{name[:80]}", field=f"{field}.{name[:80]}")
        self.path: str | None = value.get("path")
        self.command = check_strings(value.get("command", []), f"{field}.command", empty=True)
        if (self.path is None) == (not self.command):
            raise Problem(400, f"{field} needs either a path or a command", field=field)
        if self.path is not None:
            path = self.path
            if not isinstance(path, str) or not path.startswith("/") or not path.isascii() or not path.isprintable():
                raise Problem(400, f"{field}.path is no path", field=f"{field}.path")
            if " " in path:
                raise Problem(400, f"{field}.path has a space", field=f"{field}.path")
        self.port = _check_port(value.get("port"), f"{field}.port") or port
        if self.path is not None and self.port is None:
            raise Problem(400, f"{field} by path needs a port", field=f"{field}.port")
        self.interval_s = check_number(value.get("interval_s", 5.0), f"{field}.interval_s", 0.1, 3600)
        self.timeout_s = check_number(value.get("timeout_s", 2.0), f"{field}.timeout_s", 0.1, 600)
        self.retries = int(check_number(value.get("retries", 3), f"{field}.retries", 1, 100))


class Spec:
    """A checked `agent_types.WorkloadSpec`."""

    def __init__(self, value: dict[str, Any]) -> None:
        """:raises Problem: 400, a field is wrong."""
        self.raw = value
        self.entrypoint = check_strings(value.get("entrypoint"), "entrypoint")
        self.env = base_environment() | check_environment(value.get("env", {}), "env")
        self.workdir = check_directory(value.get("workdir", "/"), "workdir")
        self.port = _check_port(value.get("port"), "port")
        self.restart = value.get("restart", "on-failure")
        if self.restart not in _POLICIES:
            raise Problem(400, f"restart is none of {', '.join(_POLICIES)}", field="restart")
        check = value.get("health_check")
        self.health_check = None if check is None else HealthCheck(check, self.port)


def spec_of(value: object) -> Spec:
    """:raises Problem: 400, it is none."""
    return Spec(check_object(value, _FIELDS, "the workload"))


def _check_port(value: object, field: str) -> int | None:
    if value is None:
        return None
    return int(check_number(value, field, 1, 65535))


class Workload:
    """What runs, how it is, and who wants to know."""

    def __init__(self, output: Output) -> None:
        self.environment: dict[str, str] = {}
        """What each run finds in its environment, unless the spec says otherwise."""
        self._output = output
        self._lock = threading.Condition()
        self._spec: Spec | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._state = "none"
        self._restarts = 0
        self._last: dict[str, int] = {}
        self._error = ""
        self._since = time.monotonic()
        self._run = 0
        self._version = 0
        self._stopping = False
        self._ended = threading.Event()
        self._bells: set[Bell] = set()
        self._pipes: tuple[int, int] | None = None
        self._pumps: list[threading.Thread] = []

    @property
    def port(self) -> int | None:
        """Where it serves HTTP, if it does."""
        spec = self._spec
        return spec.port if spec else None

    def comes(self, port: int) -> bool:
        """Whether it will listen at `port` soon, as far as anybody can tell."""
        return self._state == "starting" and port == self.port

    def status(self) -> dict[str, object]:
        """Return a `agent_types.WorkloadStatus`."""
        with self._lock:
            return self._status()

    def _status(self) -> dict[str, object]:
        process = self._process
        status: dict[str, object] = {
            "state": self._state,
            "pid": process.pid if process is not None else None,
            "restarts": self._restarts,
            **self._last,
        }
        if self._error:
            status["error"] = self._error
        status["since_s"] = round(time.monotonic() - self._since, 3)
        return status

    def serve_put(self, stream: Stream, request: Request, plugin: Plugin) -> None:
        """Answer `PUT /v1/daemon/workload`; :raises Problem: 400 malformed, 409 there is another one."""
        self.begin(Spec(decode_json(stream.read_body(request), _FIELDS)), plugin)
        self.serve_status(stream)

    def begin(self, spec: Spec, plugin: Plugin) -> None:
        """Run it from now on; :raises Problem: 409 there is another one."""
        plugin.write()
        self.environment = plugin.environment()
        with self._lock:
            if self._stopping:
                raise Problem(409, "the guest is shutting down")
            if self._spec is None:
                self._spec = spec
                self._set("starting")
                threading.Thread(target=self._supervise, args=(spec,), name="workload", daemon=True).start()
            elif self._spec.raw != spec.raw:
                raise Problem(409, "this guest has another workload already", hint="restart the VM to change it")

    def serve_status(self, stream: Stream, *, head_only: bool = False) -> None:
        """Answer `GET /v1/daemon/workload`."""
        import json

        stream.answer(200, json.dumps(self.status()).encode() + b"\n", head_only=head_only)

    def serve_watch(self, stream: Stream) -> None:
        """Answer `GET /v1/daemon/watch`; :raises Problem: 503, too many watch; :raises Gone: the client left."""
        import json

        bell = Bell()
        with self._lock:
            if len(self._bells) >= _MAX_WATCHERS:
                bell.close()
                raise Problem(503, f"{_MAX_WATCHERS} clients watch the workload already")
            self._bells.add(bell)
        try:
            stream.start(200, [("Content-Type", "application/x-ndjson")], chunked=True)
            client = Client(stream.sock)
            seen = -1
            while True:
                bell.quiet()
                with self._lock:
                    version, status = self._version, self._status()
                if version != seen:
                    seen = version
                    stream.send(chunk(json.dumps(status).encode() + b"\n"))
                client.wait({bell.fd: select.POLLIN}, None)
        finally:
            with self._lock:
                self._bells.discard(bell)
                bell.close()

    def is_copied(self, number: signal.Signals | None, timeout_s: float | None) -> str:
        """What runs is a copy now: tell it by a signal, if it wants one, and return why it is not well after
        `timeout_s`, or nothing. None: its check is not asked."""
        with self._lock:
            spec, process = self._spec, self._process
            if spec is None or process is None:
                return "" if spec is None else f"it does not run: {self._state} {self._error}".rstrip()
            if number is not None:
                try:
                    os.kill(process.pid, number)
                except ProcessLookupError:
                    pass
        if timeout_s is None:
            return ""
        end = time.monotonic() + timeout_s
        while spec.health_check is not None:
            why = run_check(spec.health_check)
            if not why or time.monotonic() >= end:
                return why
            time.sleep(_COPIED_CHECK_S)
        return ""

    def stop(self, grace_s: float) -> None:
        """Ask it to end, kill it after `grace_s`, and wait until all that it wrote is in the rings."""
        with self._lock:
            self._stopping = True
            supervised = self._spec is not None
            process = self._process
            if process is not None:
                _signal_group(process, signal.SIGTERM)
            self._lock.notify_all()
        if supervised and not self._ended.wait(grace_s):
            with self._lock:
                if self._process is not None:
                    kill_group(self._process)
            self._ended.wait(1.0)
        for pump in self._pumps:
            pump.join(1.0)

    def _set(self, state: str, error: str = "") -> None:
        if state != self._state:
            self._since = time.monotonic()
        self._state = state
        self._error = error[:500]
        self._changed()

    def _changed(self) -> None:
        self._version += 1
        for bell in self._bells:
            bell.ring()

    def _supervise(self, spec: Spec) -> None:
        try:
            self._open_pipes()
            backoff = _FIRST_BACKOFF_S
            while True:
                began = time.monotonic()
                if not self._run_once(spec):
                    return
                if time.monotonic() - began >= _WELL_S:
                    backoff = _FIRST_BACKOFF_S
                with self._lock:
                    if not self._stopping:
                        self._lock.wait_for(lambda: self._stopping, backoff)
                    if self._stopping:
                        return
                    self._restarts += 1
                    self._changed()
                backoff = min(backoff * 2, _MAX_BACKOFF_S)
        finally:
            if self._pipes is not None:
                for fd in self._pipes:
                    os.close(fd)
            self._ended.set()

    def _open_pipes(self) -> None:
        ends = []
        for kind in (agent.FRAME_STDOUT, agent.FRAME_STDERR):
            read, write = os.pipe()
            ends.append(write)
            pump = threading.Thread(target=self._pump, args=(read, kind), name=f"pump-{kind}", daemon=True)
            pump.start()
            self._pumps.append(pump)
        self._pipes = (ends[0], ends[1])

    def _pump(self, fd: int, kind: int) -> None:
        while data := os.read(fd, _READ):
            self._output.write(kind, data)
        os.close(fd)

    def _run_once(self, spec: Spec) -> bool:
        """Run it once; return whether it is to be started again."""
        import subprocess

        assert self._pipes is not None
        with self._lock:
            if self._stopping:
                self._set("exited")
                return False
            try:
                process = spawn(
                    spec.entrypoint,
                    self.environment | spec.env,
                    spec.workdir,
                    None,
                    subprocess.DEVNULL,
                    self._pipes[0],
                    self._pipes[1],
                )
            except SpawnError as error:
                self._set("failed", str(error))
                return False
            self._process = process
            self._run += 1
            run = self._run
            self._set("starting" if spec.health_check else "healthy")
        if spec.health_check is not None:
            check = spec.health_check
            threading.Thread(target=self._check, args=(check, run, process), name="check", daemon=True).start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            kill_group(process)
            code = process.wait()
            self._process = None
            self._run += 1
            self._last = how_it_ended(code)
            again = spec.restart == "always" or (spec.restart == "on-failure" and code != 0)
            if again and not self._stopping:
                self._set("starting", "it ended, and is started again soon")
                return True
            self._set("exited" if code == 0 or self._stopping else "failed")
            return False

    def _check(self, check: HealthCheck, run: int, process: subprocess.Popen[bytes]) -> None:
        """Look after one run until it has ended."""
        del process
        began = time.monotonic()
        failures = 0
        while True:
            error = run_check(check)
            with self._lock:
                if self._run != run or self._stopping:
                    return
                if not error:
                    failures = 0
                    if self._state != "healthy":
                        self._set("healthy")
                elif self._state == "starting":
                    # Before it has ever been well it is asked more often, and given the same time.
                    if time.monotonic() - began >= check.interval_s * check.retries:
                        self._set("unhealthy", error)
                else:
                    failures += 1
                    if failures >= check.retries and self._state != "unhealthy":
                        self._set("unhealthy", error)
                pause = check.interval_s
                if self._state == "starting":
                    pause = min(pause, _STARTING_CHECK_S)
                if self._lock.wait_for(lambda: self._run != run or self._stopping, pause):
                    return


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def run_check(check: HealthCheck) -> str:
    """Return why a check fails, or an empty text when it passes."""
    return _check_command(check) if check.command else _check_http(check)


def _check_command(check: HealthCheck) -> str:
    import subprocess

    null = subprocess.DEVNULL
    try:
        process = spawn(check.command, base_environment(), "/", None, null, null, null)
    except SpawnError as error:
        return str(error)
    try:
        code = process.wait(check.timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        process.wait()
        return f"the check did not end within {check.timeout_s:g} s"
    return "" if code == 0 else f"the check ended with {code}"


def _check_http(check: HealthCheck) -> str:
    import socket

    end = time.monotonic() + check.timeout_s
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(check.timeout_s)
            sock.connect(("127.0.0.1", check.port))
            head = f"GET {check.path} HTTP/1.1\r\nHost: localhost:{check.port}\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode())
            data = b""
            while b"\r\n" not in data and len(data) < 4096:
                sock.settimeout(max(0.001, end - time.monotonic()))
                piece = sock.recv(4096)
                if not piece:
                    break
                data += piece
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except OSError as error:
        return f"no answer: {error.strerror}"
    words = data.split(b"\r\n", 1)[0].split(b" ")
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return "the answer is no HTTP"
    status = int(words[1])
    return "" if 200 <= status < 400 else f"the answer has the status {status}"
