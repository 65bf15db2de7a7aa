"""The Chrome DevTools Protocol over two pipes.

Besides WebSockets on its port, Chromium speaks it on descriptors 3 and 4, as JSON messages that end with a NUL. Pipes
need no WebSocket library, have no other clients, close at once when the browser ends, and end the browser when this
program ends.

One thread reads. A call waits for a slot that this thread fills; late answers are dropped. The reader's thread calls
the handlers of a session's events, which must return at once.
"""

from __future__ import annotations

import json
import os
import re
import select
import threading
import time
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 96 * 1024 * 1024
"""Longer messages are dropped, and the call that they answer fails."""
_READ = 1024 * 1024
_DETACH_S = 5.0
_ID = re.compile(rb'^\{"id":(\d+)')

Handler = Callable[[dict[str, Any]], None]


class Ended(Exception):
    """The browser ended, or the page crashed or was closed, before it answered."""


class Late(Exception):
    """No answer arrived in time."""


class Refused(Exception):
    """The browser answered with an error."""


class TooLarge(Exception):
    """The answer is longer than `MAX_MESSAGE`."""


class Deadline:
    """A deadline."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds that are left. :raises Late: if none are"""
        left = self._end - time.monotonic()
        if left <= 0:
            raise Late
        return left


class _Call:
    def __init__(self, session: str | None) -> None:
        self.session = session
        self.done = threading.Event()
        self.result: dict[str, Any] | None = None
        self.failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self.done.set()


class Connection:
    """The two pipes of one browser. Closes them when the browser has ended."""

    def __init__(self, from_browser: int, to_browser: int) -> None:
        self._from, self._to = from_browser, to_browser
        os.set_blocking(to_browser, False)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._sessions: dict[str, Session] = {}
        self._next_id = 0
        self._closed = False
        self._handlers: dict[str, Handler] = {
            "Target.detachedFromTarget": lambda event: self._drop(event["sessionId"], "the page was closed"),
            "Target.targetCrashed": self._target_crashed,
        }
        self.crashed: set[str] = set()
        """Pages that have crashed."""
        threading.Thread(target=self._read, name="cdp", daemon=True).start()

    def call(self, method: str, deadline: Deadline, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Returns the result of a command. :raises Ended, Late, Refused, TooLarge: if there is none"""
        call = _Call(session)
        with self._lock:
            if self._closed:
                raise Ended("the browser has ended")
            self._next_id += 1
            number = self._next_id
            self._calls[number] = call
        try:
            message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
            if session is not None:
                message["sessionId"] = session
            self._send(json.dumps(message).encode() + b"\0", deadline)
            if not call.done.wait(deadline.left()):
                raise Late
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if call.failure is not None:
            raise call.failure
        assert call.result is not None
        return call.result

    def _send(self, data: bytes, deadline: Deadline) -> None:
        if not self._sending.acquire(timeout=deadline.left()):
            raise Late
        try:
            rest = memoryview(data)
            poll = select.poll()
            poll.register(self._to, select.POLLOUT)
            while rest:
                try:
                    rest = rest[os.write(self._to, rest) :]
                except BlockingIOError:
                    try:
                        poll.poll(deadline.left() * 1000)
                    except Late:
                        if len(rest) < len(data):
                            # Half a message was written, so nothing after it would be understood.
                            self._shut("the browser does not read what it is told")
                            self._hang_up()
                        raise
        except OSError:
            raise Ended("the browser has ended") from None
        finally:
            self._sending.release()

    def _read(self) -> None:
        buffer = bytearray()
        skipping = False
        try:
            while data := os.read(self._from, _READ):
                *ends, rest = data.split(b"\0")
                for piece in ends:
                    if not skipping:
                        self._take(buffer + piece)
                    buffer = bytearray()
                    skipping = False
                if not skipping:
                    buffer += rest
                    if len(buffer) > MAX_MESSAGE:
                        skipping = True
                        self._too_large(bytes(buffer[:64]))
                        buffer = bytearray()
        except OSError:
            pass
        self._shut("the browser has ended")
        os.close(self._from)
        with self._sending:
            self._hang_up()

    def _hang_up(self) -> None:
        # The number may belong to another file now: never write to it again.
        if self._to >= 0:
            os.close(self._to)
        self._to = -1

    def _too_large(self, head: bytes) -> None:
        if matched := _ID.match(head):
            with self._lock:
                call = self._calls.get(int(matched[1]))
            if call is not None:
                call.fail(TooLarge())

    def _take(self, text: bytearray) -> None:
        message = json.loads(text)
        if "id" in message:
            with self._lock:
                call = self._calls.get(message["id"])
            if call is None:
                return
            if "error" in message:
                call.fail(Refused(str(message["error"].get("message", "no reason given"))))
            else:
                call.result = message.get("result", {})
                call.done.set()
            return
        session = message.get("sessionId")
        if session is None:
            handlers = self._handlers
        else:
            with self._lock:
                found = self._sessions.get(session)
            handlers = found.handlers if found else {}
        handler = handlers.get(message.get("method", ""))
        if handler is not None:
            handler(message.get("params", {}))

    def _target_crashed(self, event: dict[str, Any]) -> None:
        self.crashed.add(event["targetId"])
        with self._lock:
            sessions = [session.id for session in self._sessions.values() if session.target == event["targetId"]]
        for session in sessions:
            self._drop(session, "the page has crashed")

    def _drop(self, session: str, why: str) -> None:
        with self._lock:
            found = self._sessions.pop(session, None)
            calls = [call for call in self._calls.values() if call.session == session]
        for call in calls:
            call.fail(Ended(why))
        if found is not None:
            found.end(why)

    def _shut(self, why: str) -> None:
        with self._lock:
            self._closed = True
            calls = [call for call in self._calls.values() if not call.done.is_set()]
            sessions = list(self._sessions)
        for call in calls:
            call.fail(Ended(why))
        for session in sessions:
            self._drop(session, why)

    def attach(self, target: str, deadline: Deadline) -> Session:
        """Returns a session with a page, for a `with` block. :raises Refused: if there is no such page"""
        session = self.call("Target.attachToTarget", deadline, targetId=target, flatten=True)["sessionId"]
        made = Session(self, target, session)
        with self._lock:
            self._sessions[session] = made
        return made

    def forget(self, session: Session) -> None:
        """Detaches, which undoes the session's changes to the page."""
        with self._lock:
            known = self._sessions.pop(session.id, None)
        if known is not None:
            try:
                self.call("Target.detachFromTarget", Deadline(_DETACH_S), sessionId=session.id)
            except (Ended, Late, Refused):
                pass


class Session:
    """A conversation with one page."""

    def __init__(self, connection: Connection, target: str, session: str) -> None:
        self.target = target
        self.id = session
        self.handlers: dict[str, Handler] = {}
        self._connection = connection
        self._changed = threading.Condition()
        self._ended = ""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.forget(self)

    def call(self, method: str, deadline: Deadline, **parameters: Any) -> dict[str, Any]:
        """Calls a command in this session; see `Connection.call`."""
        return self._connection.call(method, deadline, self.id, **parameters)

    def on(self, event: str, note: Handler) -> None:
        """Calls `note` with each such event from now on, then wakes up `wait`."""

        def handler(parameters: dict[str, Any]) -> None:
            with self._changed:
                note(parameters)
                self._changed.notify_all()

        self.handlers[event] = handler

    def wait_for(self, condition: Callable[[], bool], deadline: Deadline) -> None:
        """Waits until the events make the condition true. :raises Late, Ended: if they do not"""
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or bool(self._ended), deadline.left()):
                raise Late
            if not condition():
                raise Ended(self._ended)

    def end(self, why: str) -> None:
        """Ends all waits."""
        with self._changed:
            self._ended = why
            self._changed.notify_all()
