"""Serves the actions over HTTP, on the guest's loopback alone.

Pages in the browser reach it, too, and a page must not drive the browser that shows it. So a body needs the media type
of JSON, which a page cannot send to another origin without a preflight, which this server never grants; and `Host` has
to be a name of the loopback, against DNS rebinding.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ._actions import Failed, perform
from ._catalogue import ACTIONS, BadInput, checked, openapi
from ._cdp import MAX_MESSAGE, Ended, Late, Refused, TooLarge
from ._chromium import Chromium

_MAX_BODY = 1024 * 1024
_MAX_CONNECTIONS = 32
_MAX_ACTIONS = 8
_SOCKET_S = 30.0
_HOSTS = {"localhost", "127.0.0.1", "[::1]", "agent"}
"""Volant's agent, whose routes lead here, sends the name `agent`. No page can have that name."""


class Server(ThreadingHTTPServer):
    """Serves at most 32 connections, of which at most 8 perform actions."""

    daemon_threads = True

    def __init__(self, chromium: Chromium, listener: socket.socket) -> None:
        """Takes over `listener`."""
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.chromium = chromium
        self.acting = threading.BoundedSemaphore(_MAX_ACTIONS)
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def start(self) -> None:
        """Serves in its own thread."""
        threading.Thread(target=self.serve_forever, name="server", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Accepts no more connections while the limit is reached."""
        self._connections.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that leave; reports other errors as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = _SOCKET_S

    def do_GET(self) -> None:
        """Answers with the OpenAPI document or the health."""
        path = self.path.partition("?")[0]
        if not self._is_for_us():
            return
        if path == "/openapi.json":
            self._answer(200, "application/json", json.dumps(openapi()).encode())
        elif path == "/healthz":
            self._health()
        elif path.strip("/") in ACTIONS:
            self._problem(405, f"{path} takes POST", headers={"Allow": "POST"})
        else:
            self._problem(404, f"there is no {path[:200]}", hint=_routes())

    def do_POST(self) -> None:
        """Performs an action."""
        action = self.path.partition("?")[0].removeprefix("/")
        if not self._is_for_us():
            return
        if action not in ACTIONS:
            self._problem(404, f"there is no action {action[:200]!r}", hint=_routes())
            return
        body = self._body()
        if body is None:
            return
        try:
            fields = checked(action, json.loads(body) if body.strip() else {})
        except BadInput as error:
            self._problem(400, str(error), field=error.field)
            return
        except (ValueError, RecursionError) as error:
            self._problem(400, f"the body is no JSON: {error}")
            return
        if not self.server.acting.acquire(blocking=False):
            self._problem(503, f"{_MAX_ACTIONS} actions are under way", hint="try again", headers={"Retry-After": "1"})
            return
        try:
            self._perform(action, fields)
        finally:
            self.server.acting.release()

    def _perform(self, action: str, fields: dict[str, Any]) -> None:
        try:
            answer = perform(self.server.chromium, action, fields)
        except Failed as failed:
            self._problem(failed.status, str(failed), field=failed.field, hint=failed.hint)
        except Late:
            hint = "give it more with timeout_s"
            self._problem(504, f"{action} took more than {fields['timeout_s']:g} s", field="timeout_s", hint=hint)
        except Ended as error:
            self._problem(503, f"{error}: {action} was not finished", hint="try again", headers={"Retry-After": "1"})
        except TooLarge:
            self._problem(422, f"what {action} gives is more than {MAX_MESSAGE >> 20} MiB", hint="ask for less")
        except Refused as error:
            self._problem(422, f"the browser refuses: {error}")
        else:
            self._answer(200, answer.media_type, answer.body)

    def _health(self) -> None:
        try:
            browser = self.server.chromium.probe()
        except (Late, Ended) as error:
            self._problem(503, str(error) or "the browser does not answer", hint="it is started anew when it has ended")
        else:
            self._answer(200, "application/json", json.dumps({"status": "ok", "browser": browser}).encode() + b"\n")

    def _is_for_us(self) -> bool:
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] in _HOSTS or host in _HOSTS:
            return True
        self._problem(421, f"{host[:200]!r} is not this server", hint="it is localhost")
        return False

    def _body(self) -> bytes | None:
        """Returns the body, or None if it was invalid and has been answered."""
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding"):
            self._problem(411, "the body has no length", hint="send Content-Length")
        elif not length.isdecimal() or not length.isascii():
            self._problem(400, "Content-Length is no number")
        elif int(length) > _MAX_BODY:
            self._problem(413, f"the body is larger than {_MAX_BODY} bytes")
        else:
            body = self.rfile.read(int(length))
            if not body and "Content-Type" not in self.headers and "Origin" not in self.headers:
                return body
            if self.headers.get_content_type() == "application/json":
                return body
            self._problem(415, "the body is not said to be JSON", hint="send Content-Type: application/json")
        return None

    def _problem(
        self,
        status: int,
        detail: str,
        *,
        field: str = "",
        hint: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        text: dict[str, object] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
        text["detail"] = detail
        if field:
            text["field"] = field
        if hint:
            text["hint"] = hint
        self._answer(status, "application/problem+json", json.dumps(text).encode() + b"\n", headers)

    def _answer(self, status: int, media_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing: health checks would fill the VM's log."""

    def log_error(self, format: str, *arguments: object) -> None:
        """Ignores clients that leave or stay silent."""


def _routes() -> str:
    return f"there are POST {', '.join('/' + name for name in ACTIONS)} and GET /healthz, /openapi.json"
