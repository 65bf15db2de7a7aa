"""Which headers pass between a client and a guest, and which don't."""

from __future__ import annotations

from collections.abc import Iterable

from volant.http import without_credentials
from volant.model.agent import HOP_BY_HOP

Header = tuple[bytes, bytes]

_HOP_BY_HOP = HOP_BY_HOP | {b"trailer", b"transfer-encoding", b"http2-settings"}
_CREDENTIALS = frozenset({b"authorization", b"x-volant-api-key", b"cookie"})
_OURS_TO_SAY = frozenset({b"host", b"expect"})

_SAID_BY_US = frozenset({b"date", b"x-request-id", b"x-content-type-options", b"volant-location"})

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
"""What a browser would take as said for all of our origin, other guests and the API among it."""

SANDBOX: Header = (b"content-security-policy", b"sandbox")
"""Added to what the guest says: of several policies a browser keeps to all. `nosniff` is on every answer of ours."""


def to_guest(headers: Iterable[Header], *, host: bytes) -> list[Header]:
    """A client's headers as the guest gets them: without hop-by-hop ones and the client's credentials."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _CREDENTIALS | _OURS_TO_SAY | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # Chunks were what counted (RFC 9112, 6.3).
    kept = ((name, value) for name, value in headers if name not in dropped)
    return [(b"host", host), *(field for field in kept if field[0] != b"referer" or _is_harmless(field[1]))]


def from_guest(headers: Iterable[Header]) -> list[Header]:
    """A guest's headers as the client gets them: its pages never run as ours (contract: Access)."""
    headers = list(headers)
    dropped = _HOP_BY_HOP | _ORIGIN_WIDE | _SAID_BY_US | _named_by_connection(headers)
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # Chunks are what counts (RFC 9112, 6.3).
    # Who may read across origins is for the operator to say (VOLANT_CORS_ORIGINS), not for a guest.
    kept = [field for field in headers if field[0] not in dropped and not field[0].startswith(b"access-control-")]
    # Its page is sandboxed, so to a browser the page's own images are of another origin.
    if not any(name == b"cross-origin-resource-policy" for name, _ in kept):
        kept.append((b"cross-origin-resource-policy", b"cross-origin"))
    return [*kept, SANDBOX]


def _is_harmless(referer: bytes) -> bool:
    """Whether the address of the page before has no credentials in it."""
    query = referer.partition(b"?")[2]
    return without_credentials(query) == query


def _named_by_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    named = (token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b","))
    # A client that lists Content-Length here would smuggle its body past the framing.
    return frozenset(named) - {b"content-length", b"host"}
