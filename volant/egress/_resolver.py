"""The resolver of one VM, which decides the names that it may resolve and their addresses.

An address is allowed in the firewall before the guest receives it. It stays allowed for the TTL in the answer, and for
at least `_MIN_ALLOWED_S`.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address, IPv4Network

import msgspec
import trio

from volant.model import rules_of_egress
from volant.network import EgressGuest, NetworkFailed

from ._messages import MAX_ADDRESSES, Answer, Query, answer, denial, failure
from ._upstream import NoAnswer, Upstream

Allow = Callable[[int, str, Mapping[str, float]], Awaitable[None]]
"""Allows a VM, by its id, to connect to the addresses of a name, each for a number of seconds. Raises NetworkFailed."""

IN_FLIGHT = 16
"""Maximum questions of one VM that wait for an answer."""
_MIN_IN_FLIGHT_S = 0.25
"""Minimum time for which a question counts. So a VM causes at most 64 per second."""
_RESOLVE_S = 10.0
_MAX_TTL_S = 3600.0
"""Maximum TTL in an answer to a guest. Without it an address could stay allowed for 68 years."""
_MIN_ALLOWED_S = 60.0
"""Minimum time for which an address is allowed. Programs connect some time after they have resolved a name."""
_GRACE_S = 10.0
"""Added to the TTL in the firewall: the guest's TTL counts from its receipt of the answer, which is later."""
_MIN_CACHED_S = 1.0
"""Minimum time for which an answer is cached, even if its TTL is 0."""
_MAX_CACHED = 256
_MAX_DENIED = 32
_LOG_S = 60.0
"""The interval of log lines about failures of one VM."""
# The errors for guests. The full reasons, in `inspect` and the log, name addresses and programs of the host.
_NO_RULE = "no egress rule of the VM allows it"
_NOT_PUBLIC = "it leads to no address that the VM may reach"
_FAILED = "it can't be resolved now"
_logger = logging.getLogger("volant.egress")


class DeniedName(msgspec.Struct, kw_only=True):
    """A name that a VM could not resolve."""

    name: str
    why: str
    count: int = 0
    last_s: float = 0.0
    """The time of the last query, by trio's clock."""


class Resolver:
    """Answers the queries of one VM."""

    def __init__(self, guest: EgressGuest, upstream: Upstream, allow: Allow) -> None:
        self._guest = guest
        self._rules = rules_of_egress(guest.egress)
        self._networks = tuple(IPv4Network(rule.cidr) for rule in self._rules if rule.cidr is not None)
        self._upstream = upstream
        self._allow = allow
        self._cache: OrderedDict[str, tuple[Answer, float]] = OrderedDict()
        self._in_flight = 0
        self.denied: OrderedDict[str, DeniedName] = OrderedDict()
        """The most recent ones, by name."""
        self.denied_count = 0
        self._log_from = -math.inf

    def answer_now(self, query: Query, *, tcp: bool) -> bytes | None:
        """Returns the answer, or None if a DNS server must be asked. `tcp` is the transport."""
        if not query.is_plain or not any(rule.matches(query.name) for rule in self._rules):
            self._note_denied(query.name, _NO_RULE)
            return denial(query, _NO_RULE)
        if query.kind != "A":
            # Guests have no IPv6, and other records would lead past the firewall.
            return answer(query, Answer(), tcp=tcp)
        found = self._cached(query.name)
        if found is not None:
            return answer(query, found, tcp=tcp)
        if self._in_flight >= IN_FLIGHT:
            return failure(query, "the VM asks too many questions at a time")
        return None

    async def answer_later(self, query: Query, send: Callable[[bytes], Awaitable[None]], *, tcp: bool) -> None:
        """Answers a query that `answer_now` could not answer."""
        self._in_flight += 1
        began = trio.current_time()
        try:
            try:
                await send(await self._resolve(query, tcp))
            finally:
                # Also if the guest has closed its connection: otherwise it could cause more questions by that.
                await trio.sleep_until(began + _MIN_IN_FLIGHT_S)
        finally:
            self._in_flight -= 1

    async def _resolve(self, query: Query, tcp: bool) -> bytes:
        try:
            with trio.fail_after(_RESOLVE_S):
                found = await self._upstream.resolve(query.name)
                # Exactly the addresses that the guest gets.
                allowed = tuple(filter(self._may_lead_to, found.addresses))[:MAX_ADDRESSES]
                if found.addresses and not allowed:
                    why = f"it leads to {found.addresses[0]}, which is not public, and no `cidr` rule allows it"
                    self._note_denied(query.name, why)
                    return denial(query, _NOT_PUBLIC)
                ttl_s = min(found.ttl_s, _MAX_TTL_S)
                public = {address: max(ttl_s + _GRACE_S, _MIN_ALLOWED_S) for address in allowed if _is_public(address)}
                if public:
                    await self._allow(self._guest.vm_id, query.name, public)
        except (NoAnswer, NetworkFailed, trio.TooSlowError) as error:
            why = str(error) or "it can't be resolved in time"
            self._note_denied(query.name, why)
            self._log(why)
            return failure(query, _FAILED)
        found = Answer(allowed, int(ttl_s), None, found.exists)
        self._cache[query.name] = found, trio.current_time() + max(ttl_s, _MIN_CACHED_S)
        while len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return answer(query, found, tcp=tcp)

    def _cached(self, name: str) -> Answer | None:
        if name not in self._cache:
            return None
        found, until = self._cache[name]
        left_s = until - trio.current_time()
        if left_s <= 0:
            del self._cache[name]
            return None
        return Answer(found.addresses, min(found.ttl_s, int(left_s)), None, found.exists)

    def _may_lead_to(self, address: str) -> bool:
        """Returns whether the answer may contain this address. A non-public address needs its own rule, so that no name
        leads to the host or its networks unnoticed. It is not added to the set of the name."""
        return _is_public(address) or any(IPv4Address(address) in network for network in self._networks)

    def _log(self, why: str) -> None:
        now = trio.current_time()
        if now >= self._log_from:
            self._log_from = now + _LOG_S
            _logger.warning("VM %d: a name can't be resolved: %s", self._guest.vm_id, why)

    def _note_denied(self, name: str, why: str) -> None:
        self.denied_count += 1
        name = name[:255]
        noted = self.denied.pop(name, None) or DeniedName(name=name, why=why)
        noted.why, noted.last_s = why[:255], trio.current_time()
        noted.count += 1
        self.denied[name] = noted
        while len(self.denied) > _MAX_DENIED:
            self.denied.popitem(last=False)


def _is_public(address: str) -> bool:
    parsed = IPv4Address(address)
    return parsed.is_global and not parsed.is_multicast
