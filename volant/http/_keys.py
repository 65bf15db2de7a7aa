"""Credentials of clients: API keys, tickets, and the interfaces for named keys and tokens of an issuer.

Keys and tickets are stored and compared as SHA-256 digests. So the duration of a comparison reveals nothing about them,
and no dump of an object shows one.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Protocol

import msgspec
import trio

from volant.model import ANONYMOUS, Caller, Problem, SignIn

TICKET_S = 60.0
"""How long a ticket is valid."""
MAX_TICKETS = 10_000
"""Maximum unused tickets of all callers and VMs."""
MAX_TICKETS_OF_ONE = 200
"""Maximum unused tickets per caller or VM."""
OF_ISSUER = "oidc:"
"""Prefix of the names and credentials of callers with a token."""
NOBODY = Caller(ANONYMOUS, ANONYMOUS, credential=ANONYMOUS)
"""The caller without credentials."""


class NamedKeys(Protocol):
    """API keys that administrators create while the daemon runs."""

    @property
    def required(self) -> bool:
        """Whether clients need a key, even if the settings have none."""

    def caller(self, digest: str, address: str) -> Caller | None:
        """Returns the caller with the key of this digest; None if there is no such key. :raises Problem: 401, it has
        expired."""

    def ended(self, digest: str) -> str | None:
        """Returns why a key is not valid any more; None if it is valid."""


class NoNamedKeys(NamedKeys):
    """The absence of named keys."""

    required = False

    def caller(self, digest: str, address: str) -> None:
        return None

    def ended(self, digest: str) -> str:
        return "the API key was deleted or replaced"


class CodeRequest(Protocol):
    """A sign-in of a browser at an issuer."""

    @property
    def url(self) -> str:
        """The issuer's URL to which the browser goes next."""

    @property
    def state(self) -> str:
        """The state that the issuer's answer must contain."""

    async def finish(self, answer: Mapping[str, str], address: str) -> Caller:
        """Returns the caller in the issuer's answer; may take seconds.

        :raises Problem: 401, the sign-in has failed; 403, it was denied, or the caller has no role; 503, the issuer
            does not answer correctly.
        """


class Tokens(Protocol):
    """Tokens of an OpenID Connect issuer."""

    @property
    def accepted(self) -> bool:
        """Whether an issuer is set."""

    @property
    def has_administrator(self) -> bool:
        """Whether a token can give the role `admin`."""

    @property
    def sign_in(self) -> SignIn | None:
        """Returns the data that a client needs to sign in; None if no issuer is set."""

    @property
    def signs_in_browsers(self) -> bool:
        """Whether browsers can sign in at the issuer."""

    async def begin(self, redirect_uri: str) -> CodeRequest:
        """Begins a sign-in of a browser, which the issuer sends back to `redirect_uri`; may take seconds.

        :raises Problem: 409, there is no issuer for browsers; 503, it does not answer.
        """

    async def prepare(self, token: bytes) -> None:
        """Fetches the keys for verifying a token; may take seconds. :raises Problem: 503, too many requests wait."""

    def caller(self, token: bytes, address: str) -> Caller:
        """Returns the caller with this token.

        :raises Problem: 401, the token is not valid; 403, it has no role; 503, the keys of the issuer are unknown.
        """

    def ended(self, credential: str) -> str | None:
        """Returns why the token of a caller is not valid any more; None if it is valid."""

    def left_s(self, credential: str) -> float:
        """Returns the remaining seconds of a caller's token."""


class NoTokens(Tokens):
    """The absence of an issuer: accepts no tokens."""

    accepted = False
    has_administrator = False
    sign_in = None
    signs_in_browsers = False

    async def begin(self, redirect_uri: str) -> CodeRequest:
        raise Problem(409, "no-browser-sign-in", "this daemon accepts no tokens", hint="sign in with a key")

    async def prepare(self, token: bytes) -> None: ...

    def caller(self, token: bytes, address: str) -> Caller:
        raise Problem(401, "unauthenticated", "this daemon accepts no tokens")

    def ended(self, credential: str) -> str:
        return "this daemon does not accept tokens any more"

    def left_s(self, credential: str) -> float:
        return 0.0


def is_token(given: bytes) -> bool:
    """Returns whether credentials are a token of an issuer (a JWT) and not an API key."""
    return given.startswith(b"eyJ") and given.count(b".") == 2


class Keys:
    """The API keys of the settings, which have the role `admin`."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest_of(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, digest: bytes) -> bool:
        """Returns whether one of the keys has this digest. Takes the same time for either answer."""
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class OtherTickets(Protocol):
    """Tickets that other hosts of a fleet have issued."""

    async def redeem(self, host: str, ticket: bytes, path: str) -> Caller | None:
        """Redeems a ticket at that host, see `Tickets.redeem`."""


class _Ticket(msgspec.Struct, frozen=True):
    expires_at: float
    """The expiry, on Trio's clock."""
    path: str | None
    caller: Caller


class Tickets:
    """Issues tickets, each of which replaces a key once, within `TICKET_S` seconds. So a ticket in a browser's history
    or a log is useless."""

    def __init__(self, limit: int = MAX_TICKETS) -> None:
        self.issuer = ""
        """The host of a fleet that tickets contain."""
        self._limit = limit
        # In the order in which they expire, because all have the same lifetime.
        self._kept: dict[bytes, _Ticket] = {}
        self._of: dict[int | str, deque[bytes]] = {}

    def issue(self, owner: int | str | None = None, *, path: str | None = None, caller: Caller = NOBODY) -> str:
        """Returns a new ticket.

        :param owner: the id of the VM or caller that causes it. Each may have `MAX_TICKETS_OF_ONE`; another one removes
            its oldest. So no guest or caller can use up the tickets of others
        :param path: the ticket is valid for this path and all below it; None for any path
        :param caller: the caller of requests with the ticket
        :raises Problem: 503, there are too many unused tickets.
        """
        now = trio.current_time()
        while self._kept:
            oldest = next(iter(self._kept))
            if self._kept[oldest].expires_at > now:
                break
            del self._kept[oldest]
        if len(self._kept) >= self._limit:
            raise Problem(
                503,
                "too-many-tickets",
                f"there are {self._limit} unused tickets",
                hint="try again in a minute, when they expire",
            )
        ticket = secrets.token_urlsafe(32)
        if self.issuer:
            ticket = f"{self.issuer}.{ticket}"
        digest = digest_of(ticket.encode())
        self._kept[digest] = _Ticket(now + TICKET_S, None if path is None else path.rstrip("/"), caller)
        if owner is not None:
            self._keep(owner, digest)
        return ticket

    def redeem(self, given: bytes, path: str = "") -> Caller | None:
        """Uses up a ticket. Returns its caller; None if it is unknown, used, expired or for another path.

        :param path: the path of the request, as sent
        """
        kept = self._kept.pop(digest_of(given), None)
        if kept is None or trio.current_time() >= kept.expires_at:
            return None
        if kept.path is not None and path != kept.path and not path.startswith(kept.path + "/"):
            return None
        return kept.caller

    def clear(self) -> None:
        """Invalidates all tickets."""
        self._kept.clear()
        self._of.clear()

    def _keep(self, owner: int | str, digest: bytes) -> None:
        if owner not in self._of:
            self._of = {one: kept for one, kept in self._of.items() if kept[-1] in self._kept}
        kept = self._of.setdefault(owner, deque())
        kept.append(digest)
        if len(kept) > MAX_TICKETS_OF_ONE:
            self._kept.pop(kept.popleft(), None)


def digest_of(value: bytes) -> bytes:
    """Returns the digest that is stored and compared in place of a secret."""
    return sha256(value).digest()
