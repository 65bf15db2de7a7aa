"""What a client shows to be let in: an API key, or a ticket that was made with one.

Both are compared as SHA-256 digests and never kept as they are, so that how long a comparison takes tells nothing of
them, and no dump of an object shows one.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Iterable
from hashlib import sha256

import trio

from volant.model import Problem

TICKET_S = 60.0
"""How long a ticket is good."""
MAX_TICKETS = 10_000
"""So many may be waiting to be used."""
MAX_TICKETS_OF_ONE = 200
"""So many of one owner."""


class Keys:
    """The API keys in force. None at all means that nobody is asked for one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, given: bytes) -> bytes | None:
        """The digest of `given` if it is one of them. Takes as long for any answer."""
        digest = _digest(given)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return digest if found else None


class Tickets:
    """Stand for a key once, within `TICKET_S` seconds: a URL with one may end in a history or a log, and is worth
    nothing there."""

    def __init__(self, most: int = MAX_TICKETS) -> None:
        self._most = most
        # In the order in which they end, as all last equally long.
        self._good_until: dict[bytes, float] = {}
        self._of: dict[int, deque[bytes]] = {}

    def issue(self, owner: int | None = None) -> str:
        """A new ticket. Those that are made because of one VM (`owner`) are few: its oldest makes room, so that a guest
        which has many made takes none from others.

        :raises Problem: 503 when too many are waiting to be used.
        """
        now = trio.current_time()
        while self._good_until:
            oldest = next(iter(self._good_until))
            if self._good_until[oldest] > now:
                break
            del self._good_until[oldest]
        if len(self._good_until) >= self._most:
            raise Problem(
                503, "too-many-tickets", f"{self._most} tickets wait to be used", hint="each lasts for a minute"
            )
        ticket = secrets.token_urlsafe(32)
        digest = _digest(ticket.encode())
        self._good_until[digest] = now + TICKET_S
        if owner is not None:
            self._keep(owner, digest)
        return ticket

    def redeem(self, given: bytes) -> bool:
        """Use a ticket up; whether it was good."""
        good_until = self._good_until.pop(_digest(given), None)
        return good_until is not None and trio.current_time() < good_until

    def clear(self) -> None:
        """Let none be good any more."""
        self._good_until.clear()
        self._of.clear()

    def _keep(self, owner: int, digest: bytes) -> None:
        if owner not in self._of:
            self._of = {one: kept for one, kept in self._of.items() if kept[-1] in self._good_until}
        kept = self._of.setdefault(owner, deque())
        kept.append(digest)
        if len(kept) > MAX_TICKETS_OF_ONE:
            self._good_until.pop(kept.popleft(), None)


def _digest(value: bytes) -> bytes:
    return sha256(value).digest()
