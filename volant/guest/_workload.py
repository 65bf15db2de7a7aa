"""The workload: the main program of a guest. This module starts, watches, checks and restarts it.

The two pipes that it writes to live as long as the agent, so all runs share them and two pump threads are enough. When
a run has ended, the rest of its process group is killed before the next run: a child left behind would keep the port.

A workload with `attach` waits for its first client instead, and its first run is a command to which this client is
attached: with a terminal or standard input, and with its output in the log too. It counts as ended once the client has
read its end, because the daemon may then stop the VM.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from volant.model import agent

from ._checks import (
    check_directory,
    check_environment,
    check_flag,
    check_object,
    check_port,
    check_signal,
    check_strings,
    check_user,
    decode_json,
)
from ._health_check import HealthCheck
from ._http import Problem
from ._process import Setting, SpawnError, how_it_ended, kill_group, signal_group, spawn
from ._stream import chunk
from ._watch import Client, Wakeup

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

    from ._exec_program import Program
    from ._exec_session import Peer, Session
    from ._http import Request
    from ._output import Output
    from ._plugin import Plugin
    from ._stream import Stream

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_WELL_S = 60.0
"""A run of this length resets the delay before the next."""
_STARTING_CHECK_S = 0.5
_COPIED_CHECK_S = 0.05
_READ = 64 * 1024
_MAX_WATCHERS = 8
_CLIENT_S = 60.0
"""How long a workload waits for its first client."""
_CONFIGURED_S = 15.0
"""How long that client waits for the workload: a VM may be `running` shortly before its agent has received it."""
_LAST_WORDS_S = 2.0
"""How long a shutdown waits until the client has read the end of the workload."""
_FIELDS = {"entrypoint", "env", "workdir", "user", "stop_signal", "port", "restart", "health_check", "attach"}
_POLICIES = ("never", "on-failure", "always")


class Spec:
    """A checked `agent_types.WorkloadSpec`."""

    def __init__(self, value: dict[str, Any]) -> None:
        """Parses a spec. :raises Problem: 400, a field is wrong."""
        self.raw = value
        self.entrypoint = check_strings(value.get("entrypoint"), "entrypoint")
        self.setting = Setting(
            check_environment(value.get("env", {}), "env"),
            check_user(value.get("user"), "user"),
            check_directory(value.get("workdir", "/"), "workdir"),
            makes_workdir=True,
        )
        self.stop_signal = check_signal(value.get("stop_signal", agent.DEFAULT_STOP_SIGNAL), "stop_signal")
        self.port = check_port(value.get("port"), "port")
        self.restart = value.get("restart", "on-failure")
        if self.restart not in _POLICIES:
            raise Problem(400, f"restart is none of {', '.join(_POLICIES)}", field="restart")
        self.attach = check_flag(value.get("attach", False), "attach")
        check = value.get("health_check")
        self.health_check = None if check is None else HealthCheck(check, self.port, self.setting)


def check_spec(value: object) -> Spec:
    """Returns the spec of a workload. :raises Problem: 400, a field is wrong."""
    return Spec(check_object(value, _FIELDS, "the workload"))


class Workload:
    """The workload, its state, and the clients that watch it."""

    def __init__(self, output: Output) -> None:
        self.leader_changed: Callable[[int | None], None] = lambda pid: None
        """Called with the first process of a run, and with None after the run has ended."""
        self._output = output
        self._lock = threading.Condition()
        self._spec: Spec | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._waits = False
        """Whether it waits for its first client."""
        self._first: tuple[Session, Peer] | None = None
        """Its first run and the client that it waited for, if any."""
        self._state = "none"
        self._restarts = 0
        self._last: dict[str, int] = {}
        self._error = ""
        self._since = time.monotonic()
        self._run = 0
        self._version = 0
        self._stopping = False
        self._ended = threading.Event()
        self._watchers: set[Wakeup] = set()
        self._pipes: tuple[int, int] | None = None
        self._pumps: list[threading.Thread] = []

    @property
    def port(self) -> int | None:
        """The port at which it serves HTTP, if any."""
        spec = self._spec
        return spec.port if spec else None

    def is_starting_at(self, port: int) -> bool:
        """Returns whether it is starting, and will serve `port`."""
        return self._state == "starting" and port == self.port

    def status(self) -> dict[str, object]:
        """Returns an `agent_types.WorkloadStatus`."""
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
        """Answers `PUT /v1/daemon/workload`. :raises Problem: 400, malformed; 409, the guest has another workload."""
        import json

        self.begin(Spec(decode_json(stream.read_body(request), _FIELDS)), plugin)
        stream.answer(200, json.dumps(self.status()).encode() + b"\n")

    def begin(self, spec: Spec, plugin: Plugin) -> None:
        """Starts supervising a workload; does nothing if it already supervises it.

        :raises Problem: 409, the guest has another workload or shuts down
        """
        plugin.write()
        environment = plugin.environment()
        with self._lock:
            if self._stopping:
                raise Problem(409, "the guest is shutting down")
            if self._spec is None:
                self._spec = spec
                spec.setting.env = environment | spec.setting.env
                spec.setting.secrets = plugin.secret_env
                self._waits = spec.attach
                self._set("starting", "it waits for a client that attaches to it" if spec.attach else "")
                self._lock.notify_all()
                threading.Thread(target=self._supervise, args=(spec,), name="workload", daemon=True).start()
            elif self._spec.raw != spec.raw:
                raise Problem(409, "this guest has another workload already", hint="restart the VM to change it")

    def start_attached(self, message: dict[str, Any], client: Peer) -> Session:
        """Starts a workload that waits for its first client.

        :param message: the client's settings: `tty`, `rows`, `cols` and `env`
        :raises Problem: 400, the message is wrong; 409, the workload does not wait for a client
        :raises SpawnError: it does not start. It keeps waiting until `fail`, when the client has been notified.
        """
        from ._exec_program import Command
        from ._exec_session import Session

        with self._lock:
            self._lock.wait_for(lambda: self._spec is not None or self._stopping, _CONFIGURED_S)
            spec = self._spec
            if spec is None or not self._waits or self._stopping:
                hint = f"attach={agent.WORKLOAD_SESSION} attaches to one that has had a client"
                raise Problem(409, f"the workload waits for no client: its state is {self._state}", hint=hint)
            command = Command({**message, "command": spec.entrypoint}, spec.setting)
            session = Session(command, agent.WORKLOAD_SESSION, log=self._output, reap=self._reap)
            self._waits = False
            self._first = (session, client)
            self._began(spec, session.process)
            self._lock.notify_all()
        return session

    def fail(self, error: str) -> None:
        """Ends a workload that waits for a client."""
        with self._lock:
            if self._waits:
                self._waits = False
                self._set("failed", error)
                self._lock.notify_all()

    def serve_watch(self, stream: Stream, request: Request) -> None:
        """Answers `GET /v1/daemon/watch`.

        :raises Problem: 503, too many clients watch
        :raises Gone: the client disconnected
        """
        import json

        del request
        wakeup = Wakeup()
        with self._lock:
            if len(self._watchers) >= _MAX_WATCHERS:
                wakeup.close()
                raise Problem(503, f"{_MAX_WATCHERS} clients watch the workload already")
            self._watchers.add(wakeup)
        try:
            stream.start(200, [("Content-Type", "application/x-ndjson")], chunked=True)
            client = Client(stream.sock)
            seen = -1
            while True:
                wakeup.clear()
                with self._lock:
                    version, status = self._version, self._status()
                if version != seen:
                    seen = version
                    stream.send(chunk(json.dumps(status).encode() + b"\n"))
                client.wait({wakeup.fd: select.POLLIN}, None)
        finally:
            with self._lock:
                self._watchers.discard(wakeup)
                wakeup.close()

    def notify_copied(self, number: signal.Signals | None, timeout_s: float | None) -> str:
        """Notifies the workload that it runs in a copy, and waits until its health check passes.

        :param number: the signal to send; None for none
        :param timeout_s: how long the check may fail; None for no check
        :returns: why the workload is not healthy, or an empty text
        """
        with self._lock:
            spec, process = self._spec, self._process
            if spec is None or process is None:
                return "" if spec is None else f"it does not run: {self._state} {self._error}".rstrip()
            if number is not None:
                _signal(process, number)
        if timeout_s is None:
            return ""
        end = time.monotonic() + timeout_s
        while spec.health_check is not None:
            why = spec.health_check.run()
            if not why or time.monotonic() >= end:
                return why
            time.sleep(_COPIED_CHECK_S)
        return ""

    def stop(self, grace_s: float) -> None:
        """Sends the stop signal, and SIGKILL after `grace_s`, and waits until all output is in the ring buffers.

        The watchers are not notified: the end of the workload belongs to the end of the guest.
        """
        with self._lock:
            self._stopping = True
            spec, process = self._spec, self._process
            if process is not None and spec is not None:
                if spec.stop_signal == signal.SIGTERM:
                    signal_group(process, signal.SIGTERM)
                else:
                    # Only its program knows what another signal is for.
                    _signal(process, spec.stop_signal)
            self._lock.notify_all()
            if not self._lock.wait_for(lambda: self._process is None, grace_s) and self._process is not None:
                kill_group(self._process)
        if spec is not None:
            self._ended.wait(_LAST_WORDS_S)
        for pump in self._pumps:
            pump.join(1.0)

    def _set(self, state: str, error: str = "") -> None:
        if state != self._state:
            self._since = time.monotonic()
        self._state = state
        self._error = error[:500]
        self._changed()

    def _changed(self) -> None:
        if self._stopping:
            return
        self._version += 1
        for watcher in self._watchers:
            watcher.wake()

    def _supervise(self, spec: Spec) -> None:
        run = self._run_attached if spec.attach else self._run_in_background
        try:
            backoff = _FIRST_BACKOFF_S
            while True:
                began = time.monotonic()
                if not run(spec):
                    return
                run = self._run_in_background
                if time.monotonic() - began >= _WELL_S:
                    backoff = _FIRST_BACKOFF_S
                with self._lock:
                    if not self._stopping:
                        self._lock.wait_for(lambda: self._stopping, backoff)
                    if self._stopping:
                        return
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

    def _run_attached(self, spec: Spec) -> bool:
        """Runs it once, for the first client; returns whether to restart it."""
        with self._lock:
            self._lock.wait_for(lambda: not self._waits or self._stopping, _CLIENT_S)
            if self._waits:
                self._waits = False
                self._set("failed", f"no client has attached to it within {_CLIENT_S:g} s")
        if self._first is None:
            return False
        session, client = self._first
        session.run(client)
        with self._lock:
            return self._has_ended(spec)

    def _reap(self, program: Program) -> dict[str, Any]:
        """Ends the rest of the first run's process group; returns the end of its leader."""
        with self._lock:
            program.kill_group()
            end = program.reap()
            self._last = {key: int(value) for key, value in end.items() if key in ("exit_code", "signal")}
            self._process = None
            self.leader_changed(None)
            self._run += 1
            self._lock.notify_all()
        return end

    def _run_in_background(self, spec: Spec) -> bool:
        """Runs it once; returns whether to restart it."""
        import subprocess

        if self._pipes is None:
            self._open_pipes()
        assert self._pipes is not None
        with self._lock:
            if self._stopping:
                self._set("exited")
                return False
            try:
                process = spawn(spec.entrypoint, spec.setting, subprocess.DEVNULL, self._pipes[0], self._pipes[1])
            except SpawnError as error:
                self._set("failed", str(error))
                return False
            self._began(spec, process)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            kill_group(process)
            self._last = how_it_ended(process.wait())
            self._process = None
            self.leader_changed(None)
            self._run += 1
            self._lock.notify_all()
            return self._has_ended(spec)

    def _began(self, spec: Spec, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.leader_changed(process.pid)
        if self._run:
            self._restarts += 1
        self._run += 1
        self._set("starting" if spec.health_check else "healthy")
        if spec.health_check is not None:
            arguments = (spec.health_check, self._run)
            threading.Thread(target=self._check, args=arguments, name="check", daemon=True).start()

    def _has_ended(self, spec: Spec) -> bool:
        """Records the end of a run; returns whether to restart it."""
        well = self._last.get("exit_code") == 0
        if not self._stopping and (spec.restart == "always" or (spec.restart == "on-failure" and not well)):
            self._set("starting", "it ended, and is started again soon")
            return True
        self._set("exited" if well or self._stopping else "failed")
        return False

    def _check(self, check: HealthCheck, run: int) -> None:
        """Checks one run until it has ended."""
        began = time.monotonic()
        failures = 0
        while True:
            error = check.run()
            with self._lock:
                if self._run != run or self._stopping:
                    return
                if not error:
                    failures = 0
                    if self._state != "healthy":
                        self._set("healthy")
                elif self._state == "starting":
                    # It is checked more often until the first success.
                    if time.monotonic() - began >= check.starts_within_s:
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


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a process that was not reaped, but not to its children."""
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass
