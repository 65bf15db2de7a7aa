"""Requests to the other hosts of a fleet."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import cast

import msgspec
import trio

from volant.channel import AgentClient, AgentProtocolError, AgentResponse, AgentUnreachable, Channel, ChannelStream
from volant.model import Problem

from ._connections import Connections

_MAX_ANSWER = 64 * 1024 * 1024
"""Maximum size of an answer in memory, enough for a list of some ten thousand VMs."""
_MAX_KEPT = 4 * _MAX_ANSWER
"""Maximum size of all answers that are read or used at a time."""
Header = tuple[bytes, bytes]
Keep = Callable[[int], None]
"""Counts bytes of an answer that is kept. :raises AgentProtocolError: there are too many."""


class PeerAnswer(msgspec.Struct, frozen=True):
    """The whole answer of another host."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class Peers:
    """Connects to other hosts.

    :param context: trusts the hosts of the fleet, and presents the certificate of this one
    :param reach: returns the address of a host by its name; :raises Problem: it is unknown or unreachable
    :param max_kept: maximum bytes of answers at a time
    """

    def __init__(self, context: ssl.SSLContext, reach: Callable[[str], str], max_kept: int = _MAX_KEPT) -> None:
        self._connections = Connections(context)
        self._reach = reach
        self._max_kept = max_kept
        self._kept = 0

    async def keep(self) -> None:
        """Keeps connections to hosts for the next requests, until cancelled. Without it each request opens its own."""
        await self._connections.keep()

    @asynccontextmanager
    async def connect(self, host: str) -> AsyncIterator[AgentClient]:
        """Yields a client for one request to a host.

        :raises Problem: 404, there is no such host; 503, it is unreachable
        """
        address = self._reach(host)
        async with trio.open_nursery() as nursery:
            yield AgentClient(cast(Channel, _Channel(self._connections, address, nursery)))
            nursery.cancel_scope.cancel()

    @contextmanager
    def keeping(self) -> Iterator[Keep]:
        """Yields a counter for the bytes of answers that the block uses, for `ask`, as many hosts may have large
        ones."""
        mine = 0

        def keep(count: int) -> None:
            nonlocal mine
            if self._kept + count > self._max_kept:
                raise AgentProtocolError(f"answers of other hosts have {self._max_kept // 2**20} MiB together already")
            self._kept += count
            mine += count

        try:
            yield keep
        finally:
            self._kept -= mine

    async def ask(
        self,
        host: str,
        target: str,
        headers: Iterable[Header],
        *,
        timeout_s: float,
        body: bytes | None = None,
        keep: Keep | None = None,
    ) -> PeerAnswer:
        """Returns the whole answer to a request: GET, or POST with a body.

        :param headers: the headers, including the caller (`request_headers`)
        :param timeout_s: the deadline for the whole request
        :param keep: the counter of `keeping`; None if the answer is small, or not kept
        :raises Problem: 404, there is no such host; 503, it is unreachable, does not answer in time, or its answer is
            too large
        """
        method = "GET" if body is None else "POST"
        try:
            with trio.fail_after(timeout_s), self.keeping() as own:
                async with (
                    self.connect(host) as client,
                    client.stream(method, target, headers, body, timeout_s=timeout_s) as got,
                ):
                    return PeerAnswer(got.status, dict(got.headers), await _whole(got, keep or own))
        except* (AgentUnreachable, AgentProtocolError) as group:
            why = _first(group)
        except* trio.TooSlowError:
            why = f"no answer within {timeout_s:g} s"
        raise Problem(503, "host-unreachable", f"the host {host!r} does not answer: {why}", retry_after_s=2)


async def _whole(answer: AgentResponse, keep: Keep) -> bytes:
    body = bytearray()
    while piece := await answer.receive():
        if len(body) + len(piece) > _MAX_ANSWER:
            raise AgentProtocolError(f"its answer is longer than {_MAX_ANSWER // 2**20} MiB")
        keep(len(piece))
        body += piece
    return bytes(body)


class _Channel:
    """A substitute for a channel, for one request."""

    def __init__(self, connections: Connections, address: str, nursery: trio.Nursery) -> None:
        self._connections = connections
        self._address = address
        self._nursery = nursery

    async def open_stream(self, *, timeout_s: float, reserved: bool = False) -> ChannelStream:
        """Opens a connection. :raises AgentUnreachable: the host can't be reached, or is another one."""
        del reserved
        return await self._connections.open(self._address, timeout_s)

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(task)


def _first(group: BaseExceptionGroup[Exception]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
