"""Rate limit of wrong API keys, for each address on its own.

An address may send `BURST` wrong keys at once and then `RATE` a second. Above that its keys are refused unchecked, as
an answer to each would let it guess at any speed. A key that was right from an address before is still checked. So an
attacker behind the same proxy, or another user of this host, can't block callers that have used it before. A new caller
there has to retry for as long as the guesses continue. Both tables are bounded; the oldest entry makes room.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import OrderedDict
from functools import lru_cache

import trio

from ._networks import parse_client

BURST = 50
"""Wrong keys at once, enough for several clients with an old key that retry behind one address."""
RATE = 5.0
"""Wrong keys a second after that."""
MOST = 1024
"""Entries in each table; some 200 bytes each."""
_WARN_S = 60.0
"""Between two warnings about one address."""

_log = logging.getLogger("volant.api")


class Guesses:
    """The addresses that sent wrong keys, and the right keys of each."""

    def __init__(self) -> None:
        # The rest of the burst, when it was computed, and when the last warning was logged.
        self._wrong: OrderedDict[str, tuple[float, float, float]] = OrderedDict()
        self._right: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def wait_s(self, address: str, digest: bytes) -> float:
        """Returns how many seconds it takes until a key with this digest is checked; 0: it is checked now."""
        if not self._wrong:
            return 0.0
        client = _client(address)
        if client not in self._wrong or (client, digest) in self._right:
            return 0.0
        left = self._left(client)
        return 0.0 if left >= 1 else (1 - left) / RATE

    def right(self, address: str, digest: bytes) -> None:
        """Remembers that this key was right."""
        known = _client(address), digest
        self._right[known] = None
        self._right.move_to_end(known)
        if len(self._right) > MOST:
            self._right.popitem(last=False)

    def wrong(self, address: str) -> None:
        """Counts a key that was wrong."""
        client = _client(address)
        now = trio.current_time()
        left = max(self._left(client) - 1, 0.0)
        warned_at = self._wrong[client][2] if client in self._wrong else -_WARN_S
        if left < 1 and now - warned_at >= _WARN_S:
            warned_at = now
            _log.warning("%s has sent %d wrong API keys; only %g a second are checked from now on", client, BURST, RATE)
        self._wrong[client] = (left, now, warned_at)
        self._wrong.move_to_end(client)
        if len(self._wrong) > MOST:
            self._wrong.popitem(last=False)

    def _left(self, client: str) -> float:
        if client not in self._wrong:
            return float(BURST)
        left, at, _ = self._wrong[client]
        return min(left + (trio.current_time() - at) * RATE, BURST)


@lru_cache(MOST)
def _client(address: str) -> str:
    """Returns the client to limit: an IPv4 address, or an IPv6 /64, within which one host can pick any address."""
    if ":" not in address:
        return address
    try:
        parsed = parse_client(address)
    except ValueError:
        return address
    return str(ipaddress.IPv6Network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)
