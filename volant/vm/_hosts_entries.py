"""Keeps the hosts entries of one guest as the members of its network are."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from volant.channel import AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff
from volant.model.agent import DAEMON_HOSTS

from ._agent_connection import AgentConnection
from ._peers import Peers

HOSTS_AT_ONCE = 8
"""So many guests at a time get new hosts entries."""
_PAUSE_S = 0.5
"""Many VMs that join a network at once cost their peers one request."""
_MAX_PAUSE_S = 60.0


class HostsEntries:
    """The hosts entries of one guest."""

    def __init__(self, connection: AgentConnection, peers: Peers) -> None:
        self._connection = connection
        self._peers = peers
        self._lock = trio.Lock()
        self.sent: Mapping[str, str] | None = None
        """What the guest has; None: that is not known."""

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
