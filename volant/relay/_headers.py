"""The headers that are passed between a client and a guest, and those that are not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from volant.http import without_credentials
from volant.model.agent import HOP_BY_HOP

Header = tuple[bytes, bytes]

_HOP_BY_HOP = HOP_BY_HOP | {b"trailer", b"transfer-encoding", b"http2-settings"}
_CREDENTIALS = frozenset(
    {b"authorization", b"x-volant-api-key", b"volant-registry-auth", b"volant-project", b"volant-session", b"cookie"}
)
_OF_ITS_USERS = frozenset({b"authorization", b"cookie"})
"""Credentials of the guest's own users, if the guest has its own origin."""
_OWN_COOKIES = re.compile(rb"(?:__Host-)?volant-[a-z]+\Z")
_SET_FOR_GUEST = frozenset({b"host", b"expect"})
_SET_FOR_CLIENT = frozenset({b"date", b"x-request-id", b"x-content-type-options", b"volant-location"})

_ORIGIN_WIDE = frozenset(
    {
        b"set-cookie",
        b"set-cookie2",
        b"service-worker-allowed",
        b"clear-site-data",
        b"strict-transport-security",
        b"alt-svc",
        b"public-key-pins",
        b"report-to",
        b"reporting-endpoints",
        b"nel",
        b"set-login",
        # Device-bound sessions: the browser would POST to a path of ours that a guest chooses.
        b"secure-session-registration",
        b"sec-session-registration",
    }
)
"""Headers that a browser would apply to the daemon's whole origin, including the API and other guests."""
_FOR_OWN_ORIGIN = frozenset({b"set-cookie", b"service-worker-allowed"})
_ADDRESSES = frozenset({b"origin", b"referer"})
_FORWARDED = frozenset({b"x-forwarded-host", b"x-forwarded-proto"})

SANDBOX: Header = (b"content-security-policy", b"sandbox")
"""Added to the guest's own policies: a browser enforces all of them. Every answer of the daemon has `nosniff`."""


def to_guest(headers: Iterable[Header], *, host: bytes) -> list[Header]:
    """Returns a client's headers for the guest: without hop-by-hop ones and the client's credentials."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _CREDENTIALS | _SET_FOR_GUEST | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # The encoding overrides the length (RFC 9112, 6.3).
    kept = ((name, value) for name, value in headers if name not in dropped)
    return [(b"host", host), *(field for field in kept if field[0] != b"referer" or _is_harmless(field[1]))]


def from_guest(headers: Iterable[Header]) -> list[Header]:
    """Returns a guest's headers for the client, so that its pages never run with the daemon's origin (contract:
    Access)."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _ORIGIN_WIDE | _SET_FOR_CLIENT | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # As above.
    # The operator decides which origins may read answers (VOLANT_CORS_ORIGINS), not a guest.
    kept = [field for field in headers if field[0] not in dropped and not field[0].startswith(b"access-control-")]
    # The page is sandboxed, so a browser treats the page's own images as another origin's.
    if not any(name == b"cross-origin-resource-policy" for name, _ in kept):
        kept.append((b"cross-origin-resource-policy", b"cross-origin"))
    return [*kept, SANDBOX]


def to_own_origin(headers: Iterable[Header], *, host: bytes, origin: bytes) -> list[Header]:
    """Returns the headers of a request at a guest's own origin for the guest, which sees itself at `host`: with the
    cookies and the `Authorization` of its own users.

    :param origin: the origin in the browser, such as `http://8080-12.localhost:7777`
    """
    headers = list(headers)
    inside = b"http://" + host
    sent = to_guest([field for field in headers if field[0] not in _OF_ITS_USERS], host=host)
    sent = [(name, _moved(value, origin, inside) if name in _ADDRESSES else value) for name, value in sent]
    sent = [field for field in sent if field[0] not in _FORWARDED]
    scheme, _, netloc = origin.partition(b"://")
    sent += [(b"x-forwarded-host", netloc), (b"x-forwarded-proto", scheme)]
    for name, value in headers:
        if name == b"authorization":
            sent.append((name, value))
        elif name == b"cookie":
            pairs = [pair.strip() for pair in value.split(b";")]
            kept = [pair for pair in pairs if pair and not _OWN_COOKIES.match(pair.partition(b"=")[0].strip())]
            if kept:
                sent.append((name, b"; ".join(kept)))
    return sent


def from_own_origin(headers: Iterable[Header]) -> list[Header]:
    """Returns the headers of an answer at the guest's own origin: as set by the guest, with cookies only for that
    origin."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | (_ORIGIN_WIDE - _FOR_OWN_ORIGIN) | (_SET_FOR_CLIENT - {b"x-content-type-options"})
    dropped |= _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # As above.
    kept = [field for field in headers if field[0] not in dropped and not field[0].startswith(b"access-control-")]
    return [(name, _host_only(value) if name == b"set-cookie" else value) for name, value in kept]


def _moved(address: bytes, origin: bytes, inside: bytes) -> bytes:
    """Returns an address at one origin as the same one at another."""
    rest = address.removeprefix(origin)
    return inside + rest if address.startswith(origin) and rest[:1] in (b"", b"/") else address


def _host_only(cookie: bytes) -> bytes:
    """Returns a cookie without `Domain`, which would reach the console and other guests."""
    parts = cookie.split(b";")
    return b";".join(part for part in parts if not part.strip().lower().startswith(b"domain"))


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """Returns the headers that a proxy passes on."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # As above.
    return [field for field in headers if field[0] not in dropped]


def _is_harmless(referer: bytes) -> bool:
    """Returns whether the address in `Referer` has no credentials in it."""
    query = referer.partition(b"?")[2]
    return without_credentials(query) == query


def _named_by_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    named = (token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b","))
    # A client that lists Content-Length here would smuggle its body past the framing.
    return frozenset(named) - {b"content-length", b"host"}
