"""Linux's network backend.

pyroute2's asyncio can't run under Trio, and its synchronous sockets belong to a thread. So each call runs in a worker
thread with its own socket, which costs half a millisecond. Calls run one at a time. One that hangs in the kernel is
abandoned at its deadline, and delays the next call instead of running in parallel.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import trio

from volant.host import TUN, Host, own_capabilities

from . import _nftables, _watch
from ._backend import Link, NetworkFailed, Route, Step
from ._steps import (
    SYSCTL,
    failure,
    forwarding_failure,
    get_link,
    is_router,
    parse_link,
    read_routes,
    read_uplinks,
    run_steps,
)

T = TypeVar("T")

_TIMEOUT_S = 20.0
_STEPS_PER_CALL = 100
"""A step takes the kernel up to 20 ms, as it waits until no CPU uses a link."""
_CAP_NET_ADMIN = 12


class HostNetwork:
    """The networks of the process's network namespace; see `NetworkBackend`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limiter = trio.CapacityLimiter(1)

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()
        _check_ready()

    async def names(self) -> Collection[str]:
        await trio.lowlevel.checkpoint()
        return [name for _, name in socket.if_nameindex()]

    async def links(self, names: Collection[str] | None = None) -> Sequence[Link]:
        return await self._call(_links, names)

    async def routes(self) -> Sequence[Route]:
        await trio.lowlevel.checkpoint()
        return [Route(destination=destination, device=device) for destination, device in read_routes() if destination]

    async def uplinks(self) -> Collection[str]:
        await trio.lowlevel.checkpoint()
        return () if is_router() else read_uplinks()

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        results: list[NetworkFailed | None] = []
        for at in range(0, len(steps), _STEPS_PER_CALL):
            results += await self._call(run_steps, steps[at : at + _STEPS_PER_CALL])
        return results

    async def check(self, rules: str) -> None:
        await _nftables.load(self._host, rules, only_check=True)

    async def load(self, rules: str) -> None:
        await _nftables.load(self._host, rules)

    async def listed(self, what: str) -> Sequence[Mapping[str, Any]]:
        return await _nftables.listed(self._host, what)

    async def watch(self, bridge: str, tables: Collection[str], on_loss: Callable[[str], None]) -> None:
        await _watch.watch(bridge, tables, on_loss)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        def call() -> T:
            # Importing it takes a quarter of a second, and most daemons don't need it.
            from pyroute2 import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError

            try:
                with IPRoute() as ipr:
                    return function(ipr, *args)
            except NetlinkError as error:
                raise failure("the host's networks can't be read", error.code) from error
            except OSError as error:
                raise failure("the host's networks can't be read", error.errno or 0) from error

        try:
            with trio.fail_after(_TIMEOUT_S):
                return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
        except trio.TooSlowError:
            raise NetworkFailed("timeout", f"the host's networks did not answer within {_TIMEOUT_S:g} s") from None


def _links(ipr: Any, names: Collection[str] | None) -> list[Link]:
    if names is None:
        messages = list(ipr.get_links())
    else:
        messages = [message for name in sorted(names) if (message := get_link(ipr, name)) is not None]
    known = {message["index"]: message.get("ifname") for message in messages}
    return [parse_link(message, known) for message in messages]


def _check_ready() -> None:
    if not may_configure_networks():
        raise NetworkFailed(
            "not_allowed", "the daemon may not configure the host's networks: run it as root or with CAP_NET_ADMIN"
        )
    if _nftables.nft() is None:
        raise NetworkFailed("firewall", _nftables.MISSING)
    if not TUN.exists():
        raise NetworkFailed("tap", f"{TUN} does not exist; run `modprobe tun`")
    switch = SYSCTL / "ipv4/conf/default/forwarding"
    try:
        is_on = switch.read_text().strip() == "1"
    except OSError as error:
        raise NetworkFailed("forwarding", f"the host has no IPv4: {error}") from error
    if not is_on and not os.access(switch, os.W_OK):
        raise forwarding_failure("ip_forward", "it can't be written")


def may_configure_networks() -> bool:
    """Returns whether the daemon has CAP_NET_ADMIN."""
    return bool(own_capabilities() >> _CAP_NET_ADMIN & 1)
