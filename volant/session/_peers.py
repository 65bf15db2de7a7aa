"""A guest's view of its network: its own addresses, and its peers by name, which are kept up to date."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import trio

from volant.channel import AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff
from volant.journal import Projection
from volant.model import VmRow, is_named
from volant.model.agent import DAEMON_HOSTS

from ._connection import AgentConnection

HOSTS_AT_ONCE = 8
"""Maximum number of guests that get new hosts entries at a time."""
_PAUSE_S = 0.5
"""The pause between two updates. Many VMs that join a network at once cost their peers one request."""
_MAX_PAUSE_S = 60.0


class HostsEntries:
    """The hosts entries of one guest."""

    def __init__(self, connection: AgentConnection, peers: Peers) -> None:
        self._connection = connection
        self._peers = peers
        self._lock = trio.Lock()
        self.sent: Mapping[str, str] | None = None
        """The entries of the guest; None if unknown."""

    async def send(self) -> None:
        """Sends the entries, unless the guest has them or its agent is too old. Raises as `AgentConnection.ask`."""
        # One request at a time: the guest may be done with the later of two first.
        async with self._lock:
            hosts = self._peers.hosts()
            if hosts != self.sent:
                # The guest may take a request that is cancelled. Until it answers, it has the one or the other.
                self.sent = None
                await self._connection.ask("PUT", DAEMON_HOSTS, {"hosts": dict(hosts)}, also=(404,))
                self.sent = hosts

    async def keep(self, limiter: trio.CapacityLimiter) -> None:
        """Sends the entries whenever they change, until cancelled. A guest that can't be reached gets them later."""
        backoff = Backoff(_PAUSE_S, _MAX_PAUSE_S)
        while True:
            if self.sent is not None:
                await self._peers.changed(self.sent)
            await backoff.pause()
            try:
                async with self._connection.limited(limiter):
                    await self.send()
                backoff.reset()
            except (AgentUnreachable, AgentProtocolError):
                continue


class Peers(msgspec.Struct):
    """The peers of one VM, from the current rows."""

    projection: Projection
    row: VmRow
    nameservers: tuple[str, ...]

    @property
    def can_change(self) -> bool:
        """Whether the VM's network has a name, so that it may have other members."""
        return is_named(self.row.network)

    def hosts(self) -> Mapping[str, str]:
        """Returns the addresses of the network's members by name, the VM among them; empty without a named network."""
        return self.projection.members(self.row.network_key) if self.can_change else {}

    async def changed(self, hosts: Mapping[str, str]) -> None:
        """Waits until the members differ from `hosts`."""
        await self.projection.members_are_not(self.row.network_key, hosts)

    def interface(self) -> dict[str, object] | None:
        """Returns the configuration of a clone's network interface (`GuestNetwork`); None if it has none."""
        lease = self.row.lease
        if lease is None:
            return None
        found: dict[str, object] = {
            "mac": lease.mac,
            "address": lease.address,
            "prefix": lease.prefix,
            "gateway": lease.gateway,
        }
        if self.nameservers:
            found["nameservers"] = list(self.nameservers)
        return found | {"hosts": dict(self.hosts())}
