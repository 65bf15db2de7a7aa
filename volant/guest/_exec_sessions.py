"""`GET /v1/exec`: commands over WebSockets, and the table of detached commands.

A detached command belongs to the agent, not to a connection: clients, the daemon and the channel may come and go. It
ends with the agent, because PID 1 kills all processes of a dead agent. Nothing is stored on a disk.
"""

from __future__ import annotations

import os
import select
import threading
import time

from volant.model.agent import WORKLOAD_SESSION

from . import _websocket
from ._checks import decode_json, parse_query
from ._exec_program import MAX_INPUT, Command
from ._exec_session import Peer, Session
from ._http import Gone, Problem
from ._process import SpawnError
from ._stream import HEAD_TIMEOUT_S
from ._watch import poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._http import Request
    from ._process import Setting
    from ._stream import Stream
    from ._workload import Workload

MAX_SESSIONS = 16
"""Maximum detached commands, including ended ones."""
KEPT_S = 600.0
"""How long an ended command is listed."""

_FIELDS = {"command", "env", "cwd", "user", "timeout_s", "stdin", "tty", "rows", "cols"}
_FIELDS_OF_WORKLOAD = {"env", "tty", "rows", "cols"}
_MAX_POSITION_DIGITS = 15
_KILL_S = 10.0
_LAST_FRAME_S = 10.0
_SHOWN_COMMAND = 200


class Sessions:
    """The detached commands of one agent, and the workload if a client has started it."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._lock = threading.Lock()
        self._sessions: dict[str, Session | None] = {}
        """Sessions in the order of their starts; None is reserved for a command that has not started yet."""

    def serve_websocket(self, stream: Stream, request: Request, set_up: Callable[[], None], defaults: Setting) -> None:
        """Answers `GET /v1/exec`.

        :param set_up: waits until the guest is set up
        :param defaults: the defaults for missing members of the request
        :raises Problem: 400, 404, 426 or 503, instead of the upgrade
        :raises Gone: the client disconnected
        """
        query = parse_query(request.query, {"detach", "attach", "from", "workload"})
        identifier = query.get("attach")
        detach = query.get("detach", "false")
        position = query.get("from")
        if detach not in ("true", "false"):
            raise Problem(400, "detach is neither true nor false", field="detach")
        if (workload := query.get("workload")) is not None:
            if workload != "true" or len(query) > 1:
                raise Problem(400, "workload=true goes with nothing else", field="workload")
            self._start_workload(stream, request, set_up)
            return
        if identifier is None:
            if position is not None:
                raise Problem(400, "from goes with attach", field="from")
            self._begin(stream, request, set_up, defaults, detach=detach == "true")
            return
        if "detach" in query:
            raise Problem(400, "an attached command has been detached already", field="detach")
        if position is not None and (not position.isdecimal() or len(position) > _MAX_POSITION_DIGITS):
            raise Problem(400, "from is not a number of bytes", field="from")
        session = self._find(identifier)
        socket = _websocket.WebSocket(stream, request, MAX_INPUT + 1)
        session.attach(Peer(socket, None if position is None else int(position)))

    def _begin(
        self, stream: Stream, request: Request, set_up: Callable[[], None], defaults: Setting, *, detach: bool
    ) -> None:
        identifier = self._reserve() if detach else None
        session: Session | None = None
        try:
            socket = _websocket.WebSocket(stream, request, MAX_INPUT + 1)
            try:
                command = Command(decode_json(_first_message(socket), _FIELDS), defaults)
                set_up()
                session = Session(command, identifier)
            except SpawnError as error:
                _send_last(socket, {"error": str(error), "code": error.code})
                return
            except Problem as problem:
                _send_problem(socket, problem)
                return
        finally:
            if identifier is not None:
                with self._lock:
                    if session is None:
                        del self._sessions[identifier]
                    else:
                        self._sessions[identifier] = session
        peer = Peer(socket, 0)
        if identifier is None:
            session.run(peer)
            return
        threading.Thread(target=session.run, name="exec", daemon=True).start()
        session.attach(peer)

    def _start_workload(self, stream: Stream, request: Request, set_up: Callable[[], None]) -> None:
        socket = _websocket.WebSocket(stream, request, MAX_INPUT + 1)
        try:
            message = decode_json(_first_message(socket), _FIELDS_OF_WORKLOAD)
            set_up()
            peer = Peer(socket, 0)
            session = self._workload.start_attached(message, peer)
        except SpawnError as error:
            try:
                _send_last(socket, {"error": str(error), "code": error.code})
            finally:
                self._workload.fail(str(error))
        except Problem as problem:
            _send_problem(socket, problem)
        else:
            with self._lock:
                self._sessions[WORKLOAD_SESSION] = session
            peer.released.wait()

    def list(self) -> list[dict[str, Any]]:
        """Returns the `agent_types.ExecSession`s, oldest first."""
        with self._lock:
            self._forget_old()
            sessions = [session for session in self._sessions.values() if session is not None]
        return [_describe(session) for session in sessions]

    def get(self, identifier: str) -> dict[str, Any]:
        """Returns one `agent_types.ExecSession`. :raises Problem: 404."""
        return _describe(self._find(identifier))

    def end(self, identifier: str) -> None:
        """Kills a command and removes it from the table. :raises Problem: 404; 503, the command does not end."""
        session = self._find(identifier)
        session.kill()
        if not session.ended_within(_KILL_S):
            raise Problem(503, f"the command {identifier} was killed, and does not end")
        with self._lock:
            self._sessions.pop(identifier, None)

    def _reserve(self) -> str:
        with self._lock:
            self._forget_old()
            if len(self._sessions) >= MAX_SESSIONS:
                ended = next((key for key, session in self._sessions.items() if session and session.end), None)
                if ended is None:
                    raise Problem(
                        503,
                        f"{MAX_SESSIONS} detached commands run already",
                        hint="end one: DELETE /v1/exec/sessions/{id}",
                        headers=[("Retry-After", "10")],
                    )
                del self._sessions[ended]
            identifier = os.urandom(8).hex()
            self._sessions[identifier] = None
            return identifier

    def _find(self, identifier: str) -> Session:
        with self._lock:
            self._forget_old()
            session = self._sessions.get(identifier)
        if session is None:
            raise Problem(
                404,
                f"there is no detached command {identifier[:40]}",
                hint=f"how one ended is kept for {KEPT_S / 60:g} minutes; GET /v1/exec/sessions lists all",
            )
        return session

    def _forget_old(self) -> None:
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if session is not None and session.ended is not None and now - session.ended > KEPT_S:
                del self._sessions[key]


def _describe(session: Session) -> dict[str, Any]:
    now = time.monotonic()
    words = [word[:_SHOWN_COMMAND] for word in session.command.command[:_SHOWN_COMMAND]]
    found: dict[str, Any] = {
        "id": session.identifier,
        "command": words,
        "tty": session.command.tty,
        "user": session.command.user,
        "attached": session.attached,
        "age_s": round(now - session.started, 3),
        "position": session.output.position,
        "pid": session.pid,
        "end": None,
    }
    if session.ended is not None:
        found |= {"pid": None, "end": session.end, "ended_s": round(now - session.ended, 3)}
    return found


def _first_message(socket: _websocket.WebSocket) -> bytes:
    """Returns the first message, which is the command. :raises Gone: the client disconnected, or sent something
    else."""
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            socket.close(_websocket.POLICY, "the command did not come in time")
        if socket.closing:
            _flush(socket)
            raise Gone
        mask = select.POLLIN | (select.POLLOUT if socket.out else 0)
        if socket.has_early or poll({socket.sock.fileno(): mask}, left):
            messages = socket.receive()
            socket.flush()
            if messages and isinstance(messages[0], str):
                if len(messages) > 1:
                    socket.unread(messages[1:])
                return messages[0].encode()
            if messages:
                socket.close(_websocket.POLICY, "the first message is the command, as text")


def _send_problem(socket: _websocket.WebSocket, problem: Problem) -> None:
    """Sends a problem as the last message: after the handshake it is too late for an HTTP status."""
    said: dict[str, Any] = {"error": problem.detail, "code": "invalid_request"}
    _send_last(socket, said | ({"field": problem.field} if problem.field else {}))


def _send_last(socket: _websocket.WebSocket, value: dict[str, Any]) -> None:
    import json

    socket.send(json.dumps(value))
    socket.close(_websocket.NORMAL)
    _flush(socket)
    deadline = time.monotonic() + _LAST_FRAME_S
    while not socket.closed and poll({socket.sock.fileno(): select.POLLIN}, deadline - time.monotonic()):
        socket.receive()


def _flush(socket: _websocket.WebSocket) -> None:
    """Writes all pending data. :raises Gone: the client has disconnected or does not read."""
    deadline = time.monotonic() + _LAST_FRAME_S
    while socket.out:
        if not poll({socket.sock.fileno(): select.POLLOUT}, deadline - time.monotonic()):
            raise Gone
        socket.flush()
