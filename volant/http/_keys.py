"""What a client shows to be let in: an API key, or a ticket that was made with one.

Both are compared as SHA-256 digests and never kept as they are, so that how long a comparison takes tells nothing of
them, and no dump of an object shows one.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import trio

from volant.model import Problem

TICKET_S = 60.0
"""How long a ticket is good."""
MAX_TICKETS = 10_000
"""So many may be waiting to be used."""
MAX_TICKETS_OF_ONE = 200
"""So many of one owner."""


ANONYMOUS = "anonymous"
"""The caller of whom nothing is known."""


class Keys:
    """The API keys in force. None at all means that nobody is asked for one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest_of(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, digest: bytes) -> bool:
        """Whether a key with this digest is one of them. Takes as long for any answer."""
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


@dataclass(frozen=True)
class _Kept:
    good_until: float
    path: str | None
    caller: str


class Tickets:
    """Stand for a key once, within `TICKET_S` seconds: a URL with one may end in a history or a log, and is worth
    nothing there."""

    def __init__(self, most: int = MAX_TICKETS) -> None:
        self._most = most
        # In the order in which they end, as all last equally long.
        self._kept: dict[bytes, _Kept] = {}
        self._of: dict[int, deque[bytes]] = {}

    def issue(self, owner: int | None = None, *, path: str | None = None, caller: str = ANONYMOUS) -> str:
        """A new ticket. Those that are made because of one VM (`owner`) are few: its oldest makes room, so that a guest
        which has many made takes none from others.

        :param path: it opens this path and what is below it; None: any
        :param caller: who asks with it
        :raises Problem: 503 when too many are waiting to be used.
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
        """Use a ticket up for a path, as it was sent; returns the caller for whom it was made if it was good."""
        kept = self._kept.pop(digest_of(given), None)
        if kept is None or trio.current_time() >= kept.good_until:
            return None
        if kept.path is not None and path != kept.path and not path.startswith(kept.path + "/"):
            return None
        return kept.caller

    def clear(self) -> None:
        """Let none be good any more."""
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
    """Returns what is kept and compared in the place of a secret."""
    return sha256(value).digest()
