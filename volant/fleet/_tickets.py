"""Tickets of other hosts: each is valid at any host, once. The host that has issued it knows whether it was used."""

from __future__ import annotations

import msgspec
import trio

from volant.model import Caller, Problem

from ._peers import Peers

REDEEM = "/fleet/v1/tickets"
"""The path at the port for other hosts."""
_REDEEM_S = 5.0
_AT_ONCE = 16


class WantRedeemed(msgspec.Struct, frozen=True):
    """The body of a request there; the answer is a `Caller`, or null."""

    ticket: str
    path: str
    """Of the client's request."""


class TicketsOfOthers:
    """Redeems tickets at the hosts that have issued them."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        # Anybody may send something that looks like a ticket.
        self._places = trio.CapacityLimiter(_AT_ONCE)

    async def redeem(self, host: str, ticket: bytes, path: str) -> Caller | None:
        """Returns the caller of a ticket, which is used up then; None: it is not valid, or its host does not answer."""
        body = msgspec.json.encode(WantRedeemed(ticket.decode("latin-1"), path))
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        try:
            async with self._places:
                answer = await self._peers.ask(host, REDEEM, headers, timeout_s=_REDEEM_S, body=body)
            return msgspec.json.decode(answer.body, type=Caller | None) if answer.status == 200 else None
        except (Problem, msgspec.MsgspecError):
            return None
