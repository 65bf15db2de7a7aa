"""Downloads an artifact by HTTP, from origins that are allowed.

The whole download has no deadline here; a server that sends nothing for `_STALL_S` has failed. The digest of the whole
file shows whether parts from several transfers belong together.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage
from typing import IO, Any

from volant import __version__

from ._errors import ImageError
from ._origins import PUBLIC, Origins, checked, connect
from ._part import Part

_STALL_S = 30.0
_TRIES = 5
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 10.0
_READ = 1024 * 1024
_TELL_S = 0.5

Tell = Callable[[int, int], None]
"""Called with the bytes that have arrived, and the total, 0 if unknown."""


class ProgressReporter:
    """Calls `tell` with the progress, at most twice a second."""

    def __init__(self, tell: Tell, total: int) -> None:
        self._tell = tell
        self._next = 0.0
        self.total = total

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TELL_S
            self._tell(done, self.total)


class _Broken(Exception):
    """A transfer broke in a way that a retry may repair. The text says how."""


class Download:
    """One file by HTTP. A broken transfer is continued where it broke (`Range`), if the server can do that."""

    def __init__(self, url: str, part: Part, tell: Tell, origins: Origins) -> None:
        self._url = url
        self._part = part
        self._reporter = ProgressReporter(tell, 0)
        # Not urllib's default opener, which follows redirects to FTP.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Handler(origins),
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self._opener.add_handler(handler)

    def run(self) -> None:
        """Downloads the file. :raises ImageError: the server fails, or has no such file."""
        pause_s = _FIRST_PAUSE_S
        tries = _TRIES
        while True:
            before = self._part.size
            try:
                return self._once()
            except _Broken as broken:
                # A transfer that makes progress gets all its tries back.
                tries = _TRIES if self._part.size > before + _READ else tries - 1
                if not tries:
                    raise ImageError("artifact_unreachable", str(broken)) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _once(self) -> None:
        begin = self._part.size
        headers = {"User-Agent": f"volant/{__version__}", "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        try:
            request = urllib.request.Request(self._url, headers=headers)
            answer = self._opener.open(request, timeout=_STALL_S)
        except urllib.error.HTTPError as error:
            with error:
                text = f"the server answers {error.code} {error.reason}"
            if begin and error.code == 416:
                raise ImageError("artifact_unreachable", f"{text} to the request for the rest") from None
            if error.code >= 500 or error.code in (408, 429):
                raise _Broken(text) from None
            code = "artifact_missing" if error.code in (404, 410) else "artifact_unreachable"
            raise ImageError(code, text) from None
        except TimeoutError:
            raise _Broken(f"the server did not answer within {_STALL_S:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Broken(f"the server can't be reached: {getattr(error, 'reason', error)}") from None
        except ValueError as error:
            raise ImageError("artifact_unreachable", f"that is not an address: {error}") from None
        assert answer is not None
        with answer:
            if begin and (answer.status != 206 or not _begins_at(answer.headers.get("Content-Range"), begin)):
                raise ImageError("artifact_unreachable", "the transfer broke, and the server can't take it up again")
            if answer.status not in (200, 206):
                raise ImageError("artifact_unreachable", f"the server answers {answer.status}")
            self._read_body(answer, begin)

    def _read_body(self, answer: http.client.HTTPResponse, begin: int) -> None:
        length = answer.headers.get("Content-Length", "")
        expected = begin + int(length) if length.isdecimal() and len(length) < 20 else None
        if expected is not None:
            self._part.expect(expected)
            self._reporter.total = expected
        while True:
            try:
                data = answer.read1(_READ)
            except TimeoutError:
                raise _Broken(f"the server sent nothing for {_STALL_S:g} s") from None
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise _Broken(f"the transfer broke after {self._part.size} bytes: {error}") from None
            if not data:
                break
            self._part.write(data)
            self._reporter.at(self._part.size)
        if expected is not None and self._part.size < expected:
            raise _Broken(f"the transfer ended after {self._part.size} of {expected} bytes")


class _Handler(urllib.request.AbstractHTTPHandler):
    """Connects to allowed addresses only, also after redirects."""

    def __init__(self, origins: Origins) -> None:
        super().__init__()
        self._origins = origins
        self._tls = ssl.create_default_context()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if self._has_proxy(req):
            return self.do_open(http.client.HTTPConnection, req)
        return self.do_open(_Connection, req, origins=self._origins)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        if self._has_proxy(req):
            return self.do_open(http.client.HTTPSConnection, req, context=self._tls)
        return self.do_open(_SecureConnection, req, origins=self._origins, tls=self._tls)

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _has_proxy(self, req: urllib.request.Request) -> bool:
        """Returns whether the operator's proxy connects to the target, and decides where that may be. The target is
        checked as far as this host can look it up."""
        # Not by comparing hosts: `req.host` is decoded, so `%31%32%37.0.0.1` would count as a proxy.
        if not (req.has_proxy() or getattr(req, "_tunnel_host", None)):
            return False
        netloc = urllib.parse.urlsplit(req.full_url).netloc
        target = urllib.parse.urlsplit(f"//{urllib.parse.unquote(netloc)}")
        # The proxy may know names that this host does not.
        with contextlib.suppress(OSError):
            checked(target.hostname or "", target.port or 0, self._origins, must_exist=False)
        return True


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to the address that was checked."""

    def __init__(self, host: str, /, *, timeout: float = _STALL_S, origins: Origins = PUBLIC, **_: Any) -> None:
        super().__init__(host, timeout=timeout)
        self._origins = origins

    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout or _STALL_S, self._origins)


class _SecureConnection(_Connection):
    """The same with TLS."""

    default_port = http.client.HTTPS_PORT

    def __init__(self, host: str, /, *, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        super().__init__(host, **options)
        self._tls = tls or ssl.create_default_context()

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith(("http://", "https://")):
            raise ImageError("artifact_unreachable", "the server redirects to something that is not HTTP")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _begins_at(content_range: str | None, begin: int) -> bool:
    return content_range is not None and content_range.startswith(f"bytes {begin}-")
