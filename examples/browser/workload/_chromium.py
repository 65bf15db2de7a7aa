"""Starts the browser, watches it, and restarts it when it ends."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from ._catalogue import DEVTOOLS_PORT
from ._cdp import Connection, Deadline, Ended, Late, Refused

PROGRAM = "/usr/lib/chromium/chromium-headless-shell"
_FLAGS = (
    # Chromium's sandbox needs user namespaces, which the kernel refuses after chroot. The VM isolates it instead.
    "--no-sandbox",
    "--no-zygote",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1280,720",
    f"--remote-debugging-port={DEVTOOLS_PORT}",
    "--remote-debugging-pipe",
)
_START_S = 120.0
_STOP_S = 3.0
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0
_WELL_S = 30.0
_PROBE_S = 4.0
_STUCK_S = 180.0
"""Seconds without an answer before the browser is killed. A large picture takes a minute under emulation."""
_SHORT_RUNS = 3


class Chromium:
    """Keeps one browser running."""

    def __init__(self, home: Path) -> None:
        self._profile = home / "profile"
        self._flags = shlex.split(os.environ.get("CHROMIUM_FLAGS", ""))
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._pid: int | None = None
        self._stopping = False
        self._answered_at = time.monotonic()
        self._supervisor = threading.Thread(target=self._supervise, name="chromium", daemon=True)
        self._current = ""
        self._choosing = threading.Lock()

    def start(self) -> None:
        """Starts the browser; returns at once."""
        self._supervisor.start()

    def stop(self) -> None:
        """Stops the browser for good."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._signal(signal.SIGTERM)
        self._supervisor.join(_STOP_S)
        with self._changed:
            self._signal(signal.SIGKILL)
        self._supervisor.join(_STOP_S)

    def connection(self, deadline: Deadline) -> Connection:
        """Returns the connection to the running browser. :raises Late: if none runs in time"""
        with self._changed:
            while self._connection is None:
                self._changed.wait(deadline.left())
            return self._connection

    def probe(self) -> str:
        """Returns the browser's own version; kills a browser that has not answered for three minutes.

        :raises Late, Ended: if it does not answer
        """
        try:
            deadline = Deadline(_PROBE_S)
            version = self.connection(deadline).call("Browser.getVersion", deadline)
        except Late:
            if time.monotonic() - self._answered_at > _STUCK_S:
                with self._changed:
                    self._say(f"has not answered for {_STUCK_S:.0f} s: killing it")
                    self._answered_at = time.monotonic()
                    self._signal(signal.SIGKILL)
            raise
        self._answered_at = time.monotonic()
        return str(version["product"])

    def page(self, connection: Connection, target: str | None, deadline: Deadline) -> str:
        """Returns the id of the page to use: the named one, the last one, any, or a new one.

        :raises LookupError: if there is no page with that name
        """
        with self._choosing:
            infos = connection.call("Target.getTargets", deadline)["targetInfos"]
            pages: list[str] = [info["targetId"] for info in infos if info["type"] == "page"]
            if target is not None:
                if target not in pages:
                    raise LookupError(target)
            elif self._current in pages and self._current not in connection.crashed:
                target = self._current
            else:
                # A crashed page never answers.
                whole = [page for page in pages if page not in connection.crashed]
                if not whole:
                    whole = [connection.call("Target.createTarget", deadline, url="about:blank")["targetId"]]
                target = whole[0]
            self._current = target
            return target

    def _supervise(self) -> None:
        pause = _FIRST_PAUSE_S
        short = 0
        while True:
            began = time.monotonic()
            try:
                self._run_once()
            except OSError as error:
                self._say(f"can't be started: {error}")
            if time.monotonic() - began > _WELL_S:
                pause, short = _FIRST_PAUSE_S, 0
            else:
                pause, short = min(pause * 2, _MAX_PAUSE_S), short + 1
            if short == _SHORT_RUNS:
                self._say("ends again and again: it gets an empty profile")
                shutil.rmtree(self._profile, ignore_errors=True)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, pause)
                if self._stopping:
                    return

    def _run_once(self) -> None:
        # Files of a killed browser, about which the next one would ask.
        for path in self._profile.glob("Singleton*"):
            path.unlink()
        with self._changed:
            if self._stopping:
                return
            self._answered_at = time.monotonic()
            pid, connection = self._launch()
            self._pid = pid
        try:
            deadline = Deadline(_START_S)
            connection.call("Target.setDiscoverTargets", deadline, discover=True)
            version = connection.call("Browser.getVersion", deadline)["product"]
            self._say(f"is {version}, ready {time.clock_gettime(time.CLOCK_BOOTTIME):.1f} s after the kernel's start")
            with self._changed:
                self._connection = connection
                self._changed.notify_all()
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        except (Ended, Late, Refused) as error:
            self._say(f"does not start: {error or 'it does not answer'}")
        finally:
            with self._changed:
                self._connection = None
                # Until it is reaped, no other process has its pid or its process group.
                self._signal(signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                self._pid = None
            self._say(f"has ended: {_how(os.waitstatus_to_exitcode(status))}")

    def _launch(self) -> tuple[int, Connection]:
        ends = [*os.pipe(), *os.pipe()]
        try:
            # Above the descriptors that Chromium uses, so that neither overwrites the other.
            ends += [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (ends[0], ends[3])]
            commands, answers = ends[4:]
            pid = os.posix_spawn(
                PROGRAM,
                [PROGRAM, *_FLAGS, f"--user-data-dir={self._profile}", *self._flags, "about:blank"],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, 2, 1),
                    (os.POSIX_SPAWN_DUP2, commands, 3),
                    (os.POSIX_SPAWN_DUP2, answers, 4),
                ],
                setpgroup=0,
                # Else it would inherit the blocked signals of this process.
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
        except BaseException:
            for end in ends:
                os.close(end)
            raise
        for end in (ends[0], *ends[3:]):
            os.close(end)
        return pid, Connection(ends[2], ends[1])

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None:
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:
                pass

    def _say(self, text: str) -> None:
        print(f"browser: Chromium {text}", file=sys.stderr, flush=True)


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
