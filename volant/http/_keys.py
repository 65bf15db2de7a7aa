"""Credentials of clients: API keys, and tickets that were made with one.

Both are stored and compared as SHA-256 digests, so the time of a comparison reveals nothing about them, and no dump of
an object shows one.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Iterable
from hashlib import sha256

import msgspec
import trio

from volant.model import Problem

TICKET_S = 60.0
"""How long a ticket is valid."""
MAX_TICKETS = 10_000
"""Unused tickets at once."""
MAX_TICKETS_OF_ONE = 200
"""Unused tickets of one owner."""


ANONYMOUS = "anonymous"
"""The caller without credentials."""


class Keys:
    """The API keys in force. Without any, no client needs one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest_of(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, digest: bytes) -> bool:
        """Whether a key with this digest is one of them. Takes the same time for either answer."""
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class _Kept(msgspec.Struct, frozen=True):
    good_until: float
    path: str | None
    caller: str


class Tickets:
    """Tickets: each replaces a key once, within `TICKET_S` seconds. So a URL with one is worth nothing in a history or
    a log."""

    def __init__(self, most: int = MAX_TICKETS) -> None:
        self._most = most
        # In the order in which they expire, as all have the same lifetime.
        self._kept: dict[bytes, _Kept] = {}
        self._of: dict[int, deque[bytes]] = {}

    def issue(self, owner: int | None = None, *, path: str | None = None, caller: str = ANONYMOUS) -> str:
        """Returns a new ticket.

        :param owner: the id of the VM for whose answers it is made. The tickets of one VM are limited, and its oldest
            makes room, so that a guest that causes many takes none from others
        :param path: the ticket is valid for this path and what is below it; None: any
        :param caller: whose requests those with the ticket are
        :raises Problem: 503 when there are too many unused ones
        """
        now = trio.current_time()
        while self._kept:
            oldest = next(iter(self._kept))
            if self._kept[oldest].good_until > now:
                break
            del self._kept[oldest]
        if len(self._kept) >= self._most:
            raise Problem(
                503, "too-many-tickets", f"{self._most} tickets wait to be used", hint="each lasts for a minute"
            )
        ticket = secrets.token_urlsafe(32)
        digest = digest_of(ticket.encode())
        self._kept[digest] = _Kept(now + TICKET_S, None if path is None else path.rstrip("/"), caller)
        if owner is not None:
            self._keep(owner, digest)
        return ticket

    def redeem(self, given: bytes, path: str = "") -> str | None:
        """Uses a ticket up for a path, as it was sent; returns the ticket's caller, None if it was not valid."""
        kept = self._kept.pop(digest_of(given), None)
        if kept is None or trio.current_time() >= kept.good_until:
            return None
        if kept.path is not None and path != kept.path and not path.startswith(kept.path + "/"):
            return None
        return kept.caller

    def clear(self) -> None:
        """Invalidates all tickets."""
        self._kept.clear()
        self._of.clear()

    def _keep(self, owner: int, digest: bytes) -> None:
        if owner not in self._of:
            self._of = {one: kept for one, kept in self._of.items() if kept[-1] in self._kept}
        kept = self._of.setdefault(owner, deque())
        kept.append(digest)
        if len(kept) > MAX_TICKETS_OF_ONE:
            self._kept.pop(kept.popleft(), None)


def digest_of(value: bytes) -> bytes:
    """Returns the digest that is stored and compared in place of a secret."""
    return sha256(value).digest()
