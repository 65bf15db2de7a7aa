"""Slows down guesses of API keys, for each address on its own.

An address may show `BURST` wrong keys at once and then `RATE` a second. Above that its keys are not looked at, as an
answer to each would let it guess at any speed. A key that was right from an address before is looked at all the same:
whoever guesses behind the same proxy, or as another user of this host, keeps no caller out who is already known. A new
caller there has to try again, for as long as the guesses go on. Both tables are bounded; the oldest entry makes room.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import OrderedDict

import trio

from ._networks import parse_client

BURST = 50
"""Wrong keys at once. Clients with an old key retry, and several may share an address."""
RATE = 5.0
"""Wrong keys a second after that."""
MOST = 1024
"""Entries in each table; some 200 bytes each."""
_WARN_S = 60.0
"""Between two warnings about one address."""

_log = logging.getLogger("volant.api")


class Guesses:
    """Who has shown wrong keys, and who right ones."""

    def __init__(self) -> None:
        # What is left of the burst, when that was, and when the log was told.
        self._wrong: OrderedDict[str, tuple[float, float, float]] = OrderedDict()
        self._right: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def wait_s(self, address: str, digest: bytes) -> float:
        """Returns how many seconds it takes until a key with this digest is looked at; 0: it is now."""
        if not self._wrong:
            return 0.0
        client = _client(address)
        if client not in self._wrong or (client, digest) in self._right:
            return 0.0
        left = self._left(client)
        return 0.0 if left >= 1 else (1 - left) / RATE

    def right(self, address: str, digest: bytes) -> None:
        """Remembers that this key was right."""
        self._right[_client(address), digest] = None
        self._right.move_to_end((_client(address), digest))
        if len(self._right) > MOST:
            self._right.popitem(last=False)

    def wrong(self, address: str) -> None:
        """Counts a key that was wrong."""
        client = _client(address)
        now = trio.current_time()
        left = max(self._left(client) - 1, 0.0)
        told_at = self._wrong[client][2] if client in self._wrong else -_WARN_S
        if left < 1 and now - told_at >= _WARN_S:
            told_at = now
            _log.warning("%s has shown %d wrong API keys; %g a second are looked at from now on", client, BURST, RATE)
        self._wrong[client] = (left, now, told_at)
        self._wrong.move_to_end(client)
        if len(self._wrong) > MOST:
            self._wrong.popitem(last=False)

    def _left(self, client: str) -> float:
        if client not in self._wrong:
            return float(BURST)
        left, at, _ = self._wrong[client]
        return min(left + (trio.current_time() - at) * RATE, BURST)


def _client(address: str) -> str:
    """Whom an address stands for: an IPv6 network of 64 bits is one host's to number."""
    if ":" not in address:
        return address
    try:
        parsed = parse_client(address)
    except ValueError:
        return address
    return str(ipaddress.IPv6Network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)
