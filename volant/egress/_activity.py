"""Denied connections and queries of VMs with an egress policy, for `inspect` and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import trio

from volant.model import VmRow, is_restricted
from volant.network import EgressFilter, NetworkFailed

from ._resolvers import VmResolvers

_READ_S = 5.0
_FRESH_S = 5.0
"""How long the counts of all VMs are cached: reading them starts a process, and every key can scrape."""


class EgressActivity:
    """Reads denied connections and queries, from the firewall and the resolvers."""

    def __init__(self, rules: EgressFilter, resolvers: VmResolvers) -> None:
        self._rules = rules
        self._resolvers = resolvers
        self._counts: Mapping[int, int] = {}
        self._counted_at = -inf
        self._counting = trio.Lock()

    async def describe(self, row: VmRow) -> Mapping[str, object] | None:
        """Returns a VM's recently denied connections and queries, ready for JSON; None if it has no egress policy."""
        if not is_restricted(row.egress):
            return None
        now = trio.current_time()
        found: dict[str, object] = {
            "denied_connections": None,
            "denied_destinations": [],
            "denied_names": [
                {"name": each.name, "why": each.why, "count": each.count, "ago_s": round(now - each.last_s, 1)}
                for each in self._resolvers.denied_names(row.id)
            ],
            "problem": None,
        }
        try:
            with trio.fail_after(_READ_S):
                found["denied_connections"] = (await self._rules.denied_connections()).get(row.id, 0)
                found["denied_destinations"] = [
                    {
                        "address": each.address,
                        "port": each.port,
                        "protocol": each.protocol,
                        "ago_s": round(each.ago_s, 1),
                    }
                    for each in await self._rules.denied_destinations(row.id)
                ]
        except (NetworkFailed, trio.TooSlowError) as error:
            found["problem"] = f"the firewall can't be read: {str(error) or 'it takes too long'}"
        return found

    async def denied_connections(self) -> Mapping[int, int]:
        """Returns the number of denied connections, by VM, up to `_FRESH_S` ago; empty if the firewall can't be
        read."""
        async with self._counting:
            if trio.current_time() - self._counted_at >= _FRESH_S:
                try:
                    with trio.fail_after(_READ_S):
                        self._counts = await self._rules.denied_connections()
                except (NetworkFailed, trio.TooSlowError):
                    self._counts = {}
                self._counted_at = trio.current_time()
            return self._counts

    def denied_names(self) -> Mapping[int, int]:
        """Returns the number of DNS queries that were denied or failed, by VM, since the daemon started."""
        return self._resolvers.denied_counts()
