"""Asks the host's DNS servers for the addresses of a name, one server after the other."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ._messages import Answer, MalformedMessage, Truncated, question, read_answer
from ._sockets import DnsSockets

_EACH_S = 3.0
"""Maximum time for one server; glibc waits 5 s for all."""
_HOPS = 8
"""Maximum answers that end in the middle of a chain of CNAMEs."""


class NoAnswer(Exception):
    """No server has answered. The text says why."""


class Upstream:
    """The DNS servers that the resolvers ask."""

    def __init__(self, sockets: DnsSockets, servers: Sequence[str]) -> None:
        self._sockets = sockets
        self._servers = servers

    async def resolve(self, name: str) -> Answer:
        """Returns the addresses of a name, at the end of its chain of CNAMEs. :raises NoAnswer:"""
        ttl_s: int | None = None
        for _ in range(_HOPS):
            found = await self._ask(name)
            ttl_s = found.ttl_s if ttl_s is None else min(ttl_s, found.ttl_s)
            if found.continues_at is None:
                return Answer(found.addresses, ttl_s, None, found.exists)
            name = found.continues_at
        raise NoAnswer(f"its chain of CNAMEs takes more than {_HOPS} questions")

    async def _ask(self, name: str) -> Answer:
        why = "the daemon knows no DNS server (VOLANT_NAMESERVERS)"
        for server in self._servers:
            try:
                with trio.fail_after(_EACH_S):
                    return await self._ask_one(server, name)
            except trio.TooSlowError:
                why = f"the DNS server {server} does not answer within {_EACH_S:g} s"
            except (OSError, MalformedMessage, ValueError) as error:
                why = f"the DNS server {server}: {error}"
        raise NoAnswer(why)

    async def _ask_one(self, server: str, name: str) -> Answer:
        asked = question(name)

        def accept(data: bytes) -> Answer | MalformedMessage | Truncated | None:
            # An answer with another id may be late, or forged: the right one may follow.
            if data[:2] != asked[:2]:
                return None
            try:
                return read_answer(asked, data)
            except (MalformedMessage, Truncated) as error:
                return error

        found: Answer | MalformedMessage | Truncated = await self._sockets.ask(server, asked, accept)
        if isinstance(found, Truncated):
            found = await self._sockets.ask(server, asked, accept, tcp=True)
        if isinstance(found, Truncated):
            raise MalformedMessage("it is truncated, although it came over TCP")
        if isinstance(found, MalformedMessage):
            raise found
        return found
