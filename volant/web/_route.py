"""`/`, `/docs` and `/console/*`: the console, the documentation of the API, and the files of both.

Files are read, and modules imported, at the first request.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import trio

from volant.http import Call, Header, StreamRoute, has_etag
from volant.model import Problem
from volant.operations import ApiDeps

if TYPE_CHECKING:
    from ._site import File, Site

_PAGE = re.compile(r"(/(?:docs)?)\Z")
_FILE = re.compile(r"/console/([^/]*)/?(.*)\Z")


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """Returns the routes of the console."""
    site = _Lazy(deps)

    async def page(call: Call) -> None:
        call.query(credentials=False).done()
        (path,) = call.args
        found = await site.get()
        _, origin = deps.access.own_address(call.scope)
        headers = [
            # Checked each time, so that an upgrade shows at once.
            (b"cache-control", b"no-cache"),
            (b"content-security-policy", found.policy(origin)),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
        ]
        # Not compressed, as it is small, and its address is the one at which scanners look for BREACH.
        await _send(call, found.pages[path], headers, compress=False)

    async def file(call: Call) -> None:
        digest, name = call.args
        found = await site.get()
        if digest != found.digest or name not in found.files:
            raise Problem(
                404, "not-found", "the console of this daemon has no such file",
                hint="it may have been upgraded: load its page again",
            )  # fmt: skip
        await _send(call, found.files[name], [(b"cache-control", b"public, max-age=31536000, immutable")])

    return [StreamRoute(_PAGE, page), StreamRoute(_FILE, file)]


class _Lazy:
    """The files, loaded at the first request."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps
        self._loading = trio.Lock()
        self._site: Site | None = None

    async def get(self) -> Site:
        """Returns the files. :raises Problem: 503, they can't be read."""
        async with self._loading:
            if self._site is None:
                try:
                    self._site = await self._deps.host.threads.run(_load)
                except OSError as error:
                    raise Problem(
                        503, "console-unreadable", f"the daemon can't read the console: {error.strerror}",
                        hint="try again in a moment", retry_after_s=1,
                    ) from error  # fmt: skip
        return self._site


def _load() -> Site:
    from ._site import load_site

    return load_site()


async def _send(call: Call, file: File, headers: list[Header], *, compress: bool = True) -> None:
    headers = [*headers, (b"etag", file.etag), (b"vary", b"Accept-Encoding")]
    if has_etag([call.header(b"if-none-match") or ""], file.etag.decode()):
        await call.reject(304, headers, b"")
        return
    body = file.body
    if compress and _takes_gzip(call.header(b"accept-encoding") or ""):
        body = file.compressed
        headers.append((b"content-encoding", b"gzip"))
    headers += [(b"content-type", file.media), (b"content-length", b"%d" % len(body))]
    await call.reject(200, headers, b"" if call.method == "HEAD" else body)


def _takes_gzip(accepted: str) -> bool:
    """Returns whether an `Accept-Encoding` allows gzip, which it may also refuse (`gzip;q=0`)."""
    from werkzeug.datastructures import Accept
    from werkzeug.http import parse_accept_header

    return bool(parse_accept_header(accepted, Accept).quality("gzip"))
