"""Keeps the redirects of a guest inside the guest.

A client that follows a 307 repeats its method, body and headers (`curl -L`, requests, httpx, Go, fetch). So a guest
that could name any address could send requests to everything that its client can reach: this daemon, which on loopback
may need no key, or another service of the client's host, which would receive the client's API key. A list of spellings
of "this daemon" can't be complete (`127.1`, `[::ffff:127.0.0.1]`, `0`, a name of the daemon). So a `Location` is
resolved from the guest's view and rebuilt below the daemon's path of the guest. Every other one becomes
`Volant-Location`, which no client follows.

Only headers are rewritten. The links in a page belong to the page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import msgspec

from volant.model import Problem

from ._headers import from_guest, from_own_origin, to_guest, to_own_origin


def unreachable(vm: str, why: str) -> Problem:
    """Returns the 502 for a guest that does not answer."""
    return Problem(502, "agent-unreachable", f"VM {vm!r} does not answer: {why}", vm=vm)


Header = tuple[bytes, bytes]

_BLANK = bytes(range(0x21))
_LOOPBACK = re.compile(rb"(?:http:)?//(?:localhost|127\.0\.0\.1|\[::1\])(?::([0-9]{1,5}))?(?=[/?#]|\Z)", re.IGNORECASE)
_AGENT = re.compile(rb"(?:http:)?//agent(?=[/?#]|\Z)", re.IGNORECASE)
_ELSEWHERE = re.compile(rb"[a-z][a-z0-9+.-]*:|[/\\]{2}", re.IGNORECASE)
_AFTER_PATH = re.compile(rb"[?#]")
_UNSAFE = re.compile(rb"[^\x21-\x5b\x5d-\x7e]")
_RELOADS = re.compile(rb"[0-9.]*\Z")
_DOT = re.compile(rb"%2e", re.IGNORECASE)


class GuestServer(msgspec.Struct, frozen=True):
    """A server in a guest, with the `Host` and the target of one request."""

    vm: str
    host: bytes
    target: str
    ended: Callable[[], tuple[int, str] | None] = lambda: None
    """Returns code and reason for closing an ended WebSocket; None to keep the guest's."""

    @property
    def name(self) -> str:
        return f"VM {self.vm}"

    def request_headers(self, headers: Iterable[Header]) -> list[Header]:
        return to_guest(headers, host=self.host)

    def answer_headers(self, headers: Iterable[Header]) -> list[Header]:
        return self.redirect(from_guest(headers))

    def upgrade_headers(self, headers: Iterable[Header]) -> list[Header]:
        return from_guest(headers)

    def closing(self) -> tuple[int, str] | None:
        return self.ended()

    def unreachable(self, why: str) -> Problem:
        return unreachable(self.vm, why)

    def redirect(self, headers: Iterable[Header]) -> list[Header]:
        """Returns `headers` of the answer with each `Location` below the daemon's path of the guest, or as
        `Volant-Location`.

        `Refresh` with an address is another redirect, and is removed. So is `URI`, a redirect of HTTP/1.0 that Python's
        urllib still follows.
        """
        sent = []
        for name, value in headers:
            if name == b"uri" or (name == b"refresh" and not _RELOADS.match(value)):
                continue
            if name == b"location":
                place = self.place(value)
                if place is not None:
                    value = place
                else:
                    name = b"volant-location"
            sent.append((name, value))
        return sent

    def place(self, location: bytes) -> bytes | None:
        """Returns the daemon's path for a guest's `location`; None if that is not in the guest."""
        location = location.strip(_BLANK)
        base = self._below(b"agent" if self.host == b"agent" else b"ports/" + self.host.rpartition(b":")[2])
        loopback = _LOOPBACK.match(location)
        agent = _AGENT.match(location) if self.host == b"agent" else None
        if loopback is not None:
            port = int(loopback[1] or 80)
            if not 0 < port < 65536:
                return None
            return self._below(b"ports/%d" % port) + _absolute(location[loopback.end() :], b"/")
        if agent is not None:
            return base + _absolute(location[agent.end() :], b"/")
        if _ELSEWHERE.match(location):
            return None
        return base + _absolute(location, self.target.encode("ascii"))

    def _below(self, what: bytes) -> bytes:
        return b"/api/v1/vms/%s/%s" % (self.vm.encode("ascii"), what)


class OwnOrigin(GuestServer, frozen=True, kw_only=True):
    """A server in a guest with its own origin, where browsers isolate it from all others."""

    origin: bytes
    """The origin in browsers: `http://8080-12.localhost:7777`."""

    def request_headers(self, headers: Iterable[Header]) -> list[Header]:
        return to_own_origin(headers, host=self.host, origin=self.origin)

    def answer_headers(self, headers: Iterable[Header]) -> list[Header]:
        return [(name, self._led(value) if name == b"location" else value) for name, value in from_own_origin(headers)]

    def upgrade_headers(self, headers: Iterable[Header]) -> list[Header]:
        return from_own_origin(headers)

    def _led(self, location: bytes) -> bytes:
        """Returns the browser's address for the guest's own address. Other addresses stay, as they receive no
        credentials of the daemon."""
        loopback = _LOOPBACK.match(location.strip(_BLANK))
        if loopback is None or loopback[1] != self.host.rpartition(b":")[2]:
            return location
        return self.origin + _absolute(location.strip(_BLANK)[loopback.end() :], b"/")


def _absolute(reference: bytes, base: bytes) -> bytes:
    """Resolves a relative reference (RFC 3986, 5.2) like browsers: backslashes are slashes, `%2e` is a dot."""
    path = _AFTER_PATH.split(reference, maxsplit=1)[0]
    rest = reference[len(path) :]
    base_path, _, base_query = base.partition(b"?")
    if not path:
        path = base_path
        if not rest.startswith(b"?") and base_query:
            rest = b"?" + base_query + rest
    elif path[:1] not in (b"/", b"\\"):
        path = base_path[: base_path.rindex(b"/") + 1] + path
    return _UNSAFE.sub(_quoted, _without_dots(path.replace(b"\\", b"/")) + rest)


def _without_dots(path: bytes) -> bytes:
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        dots = _DOT.sub(b".", segment)
        if dots == b"..":
            del kept[-1:]
        elif dots != b".":
            kept.append(segment)
    if dots in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def _quoted(found: re.Match[bytes]) -> bytes:
    return b"%%%02X" % found[0][0]
