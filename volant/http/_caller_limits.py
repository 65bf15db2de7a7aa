"""Limits for each caller, so that a faulty program leaves capacity for others.

They apply to named keys, client certificates and tokens. They do not apply at the Unix socket, to a key from the
settings, and while no key is required: these callers are administrators who can change the limits. A key and its
replacement are the same caller.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

import msgspec
import trio

from volant.model import Caller, Problem

MIB = 1024 * 1024
_MOST = 4096
"""Maximum callers whose rate is stored. The one that was idle longest is removed; by then it has its full burst
again."""


class CallerLimits(msgspec.Struct, frozen=True):
    """The limits of each caller; 0 for no limit."""

    requests_per_s: int = 200
    """Maximum requests per second. After a pause, twice as many may arrive at once."""
    at_once: int = 200
    """Maximum running requests and streams."""
    body_bytes: int = 4 * MIB
    """Maximum size of JSON bodies of running requests together: a quarter of the limit for all callers
    (`Limits.bodies`)."""


class CallerUse:
    """Counts the use of each caller."""

    def __init__(self) -> None:
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._at_once: Counter[str] = Counter()
        self._bodies: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """The number of refused requests, by limit."""

    def take_request(self, caller: Caller, limits: CallerLimits) -> None:
        """Counts a request that begins. :raises Problem: 429, the caller has reached a limit."""
        if not caller.limited:
            return
        self._check_rate(caller, limits.requests_per_s)
        if limits.at_once and self._at_once[caller.id] >= limits.at_once:
            self.refused["at_once"] += 1
            raise _too_many(f"{caller.name} has {limits.at_once} requests and streams open", "close some of them")
        self._at_once[caller.id] += 1

    def give_back_request(self, caller: Caller) -> None:
        """Counts the end of a request that `take_request` has counted."""
        if caller.limited:
            _give_back(self._at_once, caller.id, 1)

    def take_body(self, caller: Caller, size: int, limits: CallerLimits) -> None:
        """Counts `size` more bytes of a body. :raises Problem: 429, the caller has reached the limit."""
        if limits.body_bytes and self._bodies[caller.id] + size > limits.body_bytes:
            self.refused["body_bytes"] += 1
            raise _too_many(
                f"the bodies of the requests of {caller.name} are larger than {limits.body_bytes} bytes together",
                "send fewer of them at once",
            )
        self._bodies[caller.id] += size

    def give_back_body(self, caller: Caller, size: int) -> None:
        """Releases bytes that `take_body` has counted."""
        _give_back(self._bodies, caller.id, size)

    def _check_rate(self, caller: Caller, rate: int) -> None:
        if not rate:
            return
        now, burst = trio.current_time(), 2.0 * rate
        left, at = self._rates.get(caller.id, (burst, now))
        left = min(left + (now - at) * rate, burst)
        if left < 1:
            self.refused["requests"] += 1
            raise _too_many(f"{caller.name} has sent more than {rate} requests a second", "send fewer a second")
        self._rates[caller.id] = (left - 1, now)
        self._rates.move_to_end(caller.id)
        if len(self._rates) > _MOST:
            self._rates.popitem(last=False)


def _give_back(counts: Counter[str], key: str, size: int) -> None:
    counts[key] -= size
    if counts[key] <= 0:
        del counts[key]


def _too_many(detail: str, what: str) -> Problem:
    hint = f"{what}; the settings key_requests_per_s, key_requests_at_once and key_body_kb are the limits"
    return Problem(429, "too-many-requests", detail, hint=hint, retry_after_s=1)
