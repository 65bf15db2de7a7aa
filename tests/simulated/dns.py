"""The simulated machine's sockets for DNS. No packet of a guest passes here, so nobody asks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import trio

from actors import fault
from volant.egress import DnsListener
from volant.network import NetworkFailed

T = TypeVar("T")


class SimDns:
    """The sockets for DNS of one daemon; see `DnsSockets`."""

    def __init__(self) -> None:
        self._ports = count(40000)
        self.open: set[int] = set()
        """The ports that are listened to."""

    async def listen(self, address: str) -> DnsListener:
        await trio.lowlevel.checkpoint()
        if fault("resolver.cannot_listen"):
            raise NetworkFailed("egress", "the simulated host has no descriptor left")
        return _Listener(self, next(self._ports))

    async def ask(self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False) -> T:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENETUNREACH, "there is no network")


class _Listener:
    def __init__(self, dns: SimDns, port: int) -> None:
        self.port = port
        self._dns = dns
        dns.open.add(port)

    async def receive(self) -> tuple[bytes, tuple[str, int]]:
        await trio.sleep_forever()
        raise AssertionError

    async def send(self, data: bytes, to: tuple[str, int]) -> None:
        raise AssertionError("nobody has asked")

    async def accept(self) -> tuple[trio.abc.Stream, tuple[str, int]]:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        self._dns.open.discard(self.port)
