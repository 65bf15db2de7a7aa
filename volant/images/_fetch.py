"""Getting a boot medium: from a file of this host, or by HTTP.

Blocks, and is run in a process of its own (`python -m volant.images fetch`), which ends when its reader does or its
deadline has passed. So nothing here has a deadline for the whole; of a server that is silent for `_STALL_S` no more is
expected.

A transfer that breaks is taken up where it broke, some times, where the server can do that (`Range`). Whether what came
belongs together is what the digest tells.
"""

from __future__ import annotations

import errno
import http.client
import os
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage
from pathlib import Path
from typing import IO

from volant import __version__

from . import _media
from ._errors import ImageError
from ._media import Medium, Part

_STALL_S = 30.0
_TRIES = 5
_FIRST_PAUSE_S = 0.5
_READ = 1024 * 1024
_TELL_S = 0.5
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Tell = Callable[[int, int], None]
"""Hears how many bytes have come, and of how many; 0: nobody knows."""


def fetch(cache_dir: Path, url: str, digest: str, *, max_bytes: int, tell: Tell = lambda done, total: None) -> Medium:
    """Return a medium, verified, from the cache or else from `url`; blocks.

    Several may want the same one at once: one gets it, the others wait for it.

    :raises ImageError: `media_missing` there is no such file, `media_unreachable` the server does not give it,
        `media_mismatch` it is another file, `media_too_large`, `cache_full`, `cache_unwritable`, `io_error`
    """
    found = _media.find_medium(cache_dir, digest)
    if found is not None:
        return found
    with _media.locked_part(cache_dir, digest) as path:
        _media.sweep(cache_dir)
        found = _media.find_medium(cache_dir, digest) or _media.reverify(cache_dir, digest, shown(url))
        if found is not None:
            return found
        try:
            part = Part(path, max_bytes)
            try:
                local = local_path(url)
                if local is not None:
                    _copy(local, part, tell)
                else:
                    _Download(url, part, tell).run()
                actual = part.finish()
            finally:
                part.close()
            if actual != digest:
                # Of a file of this host the digest is not told: it may be one that nobody should know more of.
                what = f"its SHA-256 is {actual}" if local is None else "its SHA-256 is another one"
                raise ImageError("media_mismatch", f"{what}, and not {digest}", "correct the manifest, or the file")
            return _media.place(cache_dir, path, digest, shown(url))
        except OSError as error:
            code = "cache_full" if error.errno in _FULL else "io_error"
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


def _copy(path: Path, part: Part, tell: Tell) -> None:
    try:
        # A pipe would be waited for.
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise ImageError("media_missing", f"it can't be read: {error.strerror}") from None
    try:
        figures = os.fstat(source)
        if not stat.S_ISREG(figures.st_mode):
            raise ImageError("media_missing", "it is no regular file")
        if part.clone(source):
            return
        _media.check_space(part.path, min(figures.st_size, figures.st_blocks * 512))
        watch = _Watch(tell, figures.st_size)
        while data := _read_local(source):
            part.write(data)
            watch.at(part.size)
    finally:
        os.close(source)


def _read_local(source: int) -> bytes:
    try:
        return os.read(source, _READ)
    except OSError as error:
        raise ImageError("media_missing", f"it can't be read: {error.strerror}") from None


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

    def __init__(self, url: str, part: Part, tell: Tell) -> None:
        self._url = url
        self._part = part
        self._watch = _Watch(tell, 0)
        # Not the default one, which would follow a redirection to ftp.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
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
