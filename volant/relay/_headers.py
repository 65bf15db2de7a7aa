"""The headers that pass between a client and a guest, and those that don't."""

from __future__ import annotations

from collections.abc import Iterable

from volant.http import without_credentials
from volant.model.agent import HOP_BY_HOP

Header = tuple[bytes, bytes]

_HOP_BY_HOP = HOP_BY_HOP | {b"trailer", b"transfer-encoding", b"http2-settings"}
_CREDENTIALS = frozenset({b"authorization", b"x-volant-api-key", b"cookie"})
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
"""Headers that a browser would apply to our whole origin, with the API and other guests."""

SANDBOX: Header = (b"content-security-policy", b"sandbox")
"""Added to the guest's own policies: a browser enforces all of them. Every answer of ours has `nosniff`."""


def to_guest(headers: Iterable[Header], *, host: bytes) -> list[Header]:
    """Returns a client's headers for the guest: without hop-by-hop ones and the client's credentials."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _CREDENTIALS | _SET_FOR_GUEST | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # The encoding overrides the length (RFC 9112, 6.3).
    kept = ((name, value) for name, value in headers if name not in dropped)
    return [(b"host", host), *(field for field in kept if field[0] != b"referer" or _is_harmless(field[1]))]


def from_guest(headers: Iterable[Header]) -> list[Header]:
    """Returns a guest's headers for the client: its pages never run as ours (contract: Access)."""
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


def _is_harmless(referer: bytes) -> bool:
    """Whether the address in `Referer` has no credentials in it."""
    query = referer.partition(b"?")[2]
    return without_credentials(query) == query


def _named_by_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    named = (token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b","))
    # A client that lists Content-Length here would smuggle its body past the framing.
    return frozenset(named) - {b"content-length", b"host"}
