"""Getting a boot artifact: from a file of this host, or by HTTP.

Blocks, and is run in a process of its own (`python -m volant.images fetch`), which ends when its reader does or its
deadline has passed. So nothing here has a deadline for the whole; of a server that is silent for `_STALL_S` no more is
expected.

A transfer that breaks is taken up where it broke, some times, where the server can do that (`Range`). Whether what came
belongs together is what the digest tells.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import ssl
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any

from volant import __version__
from volant.host import open_below

from . import _artifacts
from ._artifacts import CachedArtifact, Part
from ._errors import ImageError
from ._origins import PUBLIC, Origins, checked, connect

_STALL_S = 30.0
_TRIES = 5
_FIRST_PAUSE_S = 0.5
_READ = 1024 * 1024
_TELL_S = 0.5
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk says, or a quota."""

Tell = Callable[[int, int], None]
"""Hears how many bytes have come, and of how many; 0: nobody knows."""


def fetch(
    cache_dir: Path,
    url: str,
    digest: str,
    *,
    max_bytes: int,
    origins: Origins = PUBLIC,
    source: int | None = None,
    tell: Tell = lambda done, total: None,
) -> CachedArtifact:
    """Return an artifact, verified, from the cache or else from `url`; blocks.

    Several may want the same one at once: one gets it, the others wait for it.

    :param origins: what may be fetched
    :param source: the descriptor of a local file that has been opened already, by whoever may; it stays open
    :raises ImageError: `media_missing` there is no such file, or, of this host, none that may be read and has that
        digest; `media_refused` it may not be fetched from there; `media_unreachable` the server does not give it,
        `media_mismatch` it gives another file, `media_too_large`, `cache_full`, `cache_unwritable`, `io_error`
    """
    found = _artifacts.find_artifact(cache_dir, digest)
    if found is not None:
        return found
    with _artifacts.locked_part(cache_dir, digest) as path:
        _artifacts.sweep(cache_dir)
        found = _artifacts.find_artifact(cache_dir, digest) or _artifacts.reverify(cache_dir, digest, shown(url))
        if found is not None:
            return found
        try:
            part = Part(path, max_bytes)
            try:
                local = local_path(url)
                if local is not None:
                    _copy(local, part, tell, origins, source)
                else:
                    _Download(url, part, tell, origins).run()
                actual = part.finish()
            finally:
                part.close()
            if actual != digest:
                if local is not None:
                    raise _no_such_file()
                # The digest is not told, nor is that of a file of this host: whoever has it can have the content.
                raise ImageError("media_mismatch", f"its SHA-256 is not {digest}", "correct the manifest, or the file")
            return _artifacts.place(cache_dir, path, digest, shown(url))
        except OSError as error:
            code = "cache_full" if error.errno in FULL else "io_error"
            raise ImageError(
                code, f"the cache can't be written: {error.strerror or error}", "make room there"
            ) from error


def local_path(url: str) -> Path | None:
    """Return the file of this host that is meant, or None when it lies somewhere else."""
    if url.startswith("/"):
        return Path(url)
    if url.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    return None


def shown(url: str) -> str:
    """Return an address as people may see it: what stands behind the question mark may be a secret."""
    if local_path(url) is not None:
        return url
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def _no_such_file() -> ImageError:
    """Of a file of this host nobody learns whether it is missing, may not be read, or is another one."""
    return ImageError(
        "media_missing",
        "there is no file that may be read and has this SHA-256",
        "correct the manifest or the file, or upload it with `volar plugins upload`",
    )


def _copy(path: Path, part: Part, tell: Tell, origins: Origins, given: int | None) -> None:
    try:
        if given is not None:
            source = os.dup(given)
        elif origins.anywhere:
            # A pipe would be waited for.
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        else:
            source = open_below(origins.directories, path)
    except OSError:
        raise _no_such_file() from None
    try:
        figures = os.fstat(source)
        if not stat.S_ISREG(figures.st_mode):
            raise _no_such_file()
        if part.clone(source):
            return
        _artifacts.check_space(part.path, min(figures.st_size, figures.st_blocks * 512))
        watch = _Watch(tell, figures.st_size)
        while data := _read_local(source):
            part.write(data)
            watch.at(part.size)
    finally:
        os.close(source)


def _read_local(source: int) -> bytes:
    try:
        return os.read(source, _READ)
    except OSError:
        raise _no_such_file() from None


class _Watch:
    """Tells how far it is, not too often."""

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
    """A transfer broke. The text says how; taking it up again may help."""


class _Download:
    """One file, over as many connections as it takes."""

    def __init__(self, url: str, part: Part, tell: Tell, origins: Origins) -> None:
        self._url = url
        self._part = part
        self._watch = _Watch(tell, 0)
        # Not the default one, which would follow a redirection to ftp.
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
        """:raises ImageError: it does not come."""
        pause_s = _FIRST_PAUSE_S
        tries = _TRIES
        while True:
            before = self._part.size
            try:
                return self._once()
            except _Broken as broken:
                # Whoever gets somewhere may go on.
                tries = _TRIES if self._part.size > before + _READ else tries - 1
                if not tries:
                    raise ImageError("media_unreachable", str(broken)) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)

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
                raise ImageError("media_unreachable", f"{text} to the request for the rest") from None
            if error.code >= 500 or error.code in (408, 429):
                raise _Broken(text) from None
            code = "media_missing" if error.code in (404, 410) else "media_unreachable"
            raise ImageError(code, text) from None
        except TimeoutError:
            raise _Broken(f"the server did not answer within {_STALL_S:g} s") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Broken(f"the server can't be reached: {getattr(error, 'reason', error)}") from None
        except ValueError as error:
            raise ImageError("media_unreachable", f"that is no address: {error}") from None
        assert answer is not None
        with answer:
            if begin and (answer.status != 206 or not _begins_at(answer.headers.get("Content-Range"), begin)):
                raise ImageError("media_unreachable", "the transfer broke, and the server can't take it up again")
            if answer.status not in (200, 206):
                raise ImageError("media_unreachable", f"the server answers {answer.status}")
            self._take(answer, begin)

    def _take(self, answer: http.client.HTTPResponse, begin: int) -> None:
        length = answer.headers.get("Content-Length", "")
        expected = begin + int(length) if length.isdecimal() and len(length) < 20 else None
        if expected is not None:
            self._part.expect(expected)
            self._watch.total = expected
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
            self._watch.at(self._part.size)
        if expected is not None and self._part.size < expected:
            raise _Broken(f"the transfer ended after {self._part.size} of {expected} bytes")


class _Handler(urllib.request.AbstractHTTPHandler):
    """Connects to what may be connected to, the first server and those that redirections name."""

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
        """Whether the operator's proxy connects to the target, and decides where that may be. What can be told of the
        target here is checked first."""
        # Not by a comparison of hosts: `req.host` is decoded, and so `%31%32%37.0.0.1` would pass for a proxy.
        if not (req.has_proxy() or getattr(req, "_tunnel_host", None)):
            return False
        netloc = urllib.parse.urlsplit(req.full_url).netloc
        target = urllib.parse.urlsplit(f"//{urllib.parse.unquote(netloc)}")
        # A name that this host can't look up, its proxy perhaps can.
        with contextlib.suppress(OSError):
            checked(target.hostname or "", target.port or 0, self._origins, must_exist=False)
        return True


class _Connection(http.client.HTTPConnection):
    """Connects to the address that was checked."""

    def __init__(self, host: str, /, *, timeout: float = _STALL_S, origins: Origins = PUBLIC, **_: Any) -> None:
        super().__init__(host, timeout=timeout)
        self._origins = origins

    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout or _STALL_S, self._origins)


class _SecureConnection(_Connection):
    """Likewise, with TLS."""

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
            raise ImageError("media_unreachable", "the server redirects to something that is not HTTP")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _begins_at(content_range: str | None, begin: int) -> bool:
    return content_range is not None and content_range.startswith(f"bytes {begin}-")
