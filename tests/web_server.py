"""An HTTP server in threads, for clients that are other programs or block."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class WebServer:
    """Answers as `get` and `post` of a subclass say, during its block."""

    def __init__(self, address: str = "127.0.0.1", *, protocol: str = "HTTP/1.0") -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = protocol

            def do_GET(self) -> None:
                owner.get(self)

            def do_POST(self) -> None:
                owner.post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.port = self._server.server_port
        self.origin = f"http://{address}:{self.port}"

    def get(self, request: BaseHTTPRequestHandler) -> None:
        """Answers a GET; here there is nothing."""
        request.send_error(404)

    def post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        """Answers a POST; here there is nothing."""
        request.send_error(404)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes | None = b"", **headers: object) -> None:
    """Sends a response. `body` None: the caller sends it."""
    request.send_response(status)
    if body is not None:
        headers["Content_Length"] = len(body)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()
    request.wfile.write(body or b"")


def answer_html(request: BaseHTTPRequestHandler, status: int, body: bytes = b"") -> None:
    """Sends a page."""
    answer(request, status, body, Content_Type="text/html; charset=utf-8")
