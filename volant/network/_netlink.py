"""Linux's network backend: netlink by pyroute2, taps by `/dev/net/tun`, switches by `/proc/sys`.

pyroute2's own asyncio can't run under Trio, and its synchronous calls have a socket for each thread that they are made
in. So each visit is one call in a worker thread, with a socket that lives as long as the visit: half a millisecond, and
nothing to keep or to mend. One visit at a time; one that hangs in the kernel is given up by its deadline, and holds the
next one up until that has passed too, instead of running beside it.

**A tap is made while we hold it open, and becomes permanent last.** So one that is half made goes with the process that
made it, and there is never a tap that nobody knows what to make of.

**Forwarding** is a switch for each interface that packets come in by. Where it is off for the host as a whole it is
turned on for the bridge and for the interfaces of its default routes, where the answers come in; the host's other
interfaces stay as they are. Rejected: `net.ipv4.ip_forward`, which makes a router of a host for networks that have
nothing to do with VMs. It stays on when we go, as we can't know who else relies on it by then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from volant._tap import TUN, make_permanent, open_tap
from volant.host import Host

from . import _nftables, _watch
from ._backend import (
    BridgeDown,
    ForgetConnections,
    Link,
    MakeBridge,
    MakeTap,
    NetworkFailed,
    RemoveLink,
    Route,
    SetLocalnet,
    Step,
)
from ._conntrack import forget_connections

T = TypeVar("T")

_TIMEOUT_S = 20.0
_AT_ONCE = 100
"""Steps in one visit: the kernel takes up to some 20 ms for one, as it waits until no processor looks at a link."""

_SYSCTL = Path("/proc/sys/net")

_ROUTES = Path("/proc/self/net/route")
_CAP_NET_ADMIN = 12
_FORWARDING = (
    "net.ipv4.{where} is off and can't be turned on ({why}), so nothing that guests send would leave this host; run "
    "`sysctl -w net.ipv4.ip_forward=1` on the host, and write that into a file in /etc/sysctl.d"
)
_SIOCGIFFLAGS = 0x8913
_UP = 0x1


class HostNetwork:
    """The networks of the host, or of the network namespace, that the process is in."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._turn = trio.CapacityLimiter(1)

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()
        _check_ready()

    async def names(self) -> Collection[str]:
        await trio.lowlevel.checkpoint()
        return [name for _, name in socket.if_nameindex()]

    async def links(self, names: Collection[str] | None = None) -> Sequence[Link]:
        return await self._visit(_links, names)

    async def routes(self) -> Sequence[Route]:
        await trio.lowlevel.checkpoint()
        return [Route(destination=destination, device=device) for destination, device in _routes() if destination]

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        done: list[NetworkFailed | None] = []
        for batch in (steps[at : at + _AT_ONCE] for at in range(0, len(steps), _AT_ONCE)):
            done += await self._visit(_do_all, batch)
        return done

    async def check(self, rules: str) -> None:
        await _nftables.load(self._host, rules, only_check=True)

    async def load(self, rules: str) -> None:
        await _nftables.load(self._host, rules)

    async def watch(self, bridge: str, tables: Collection[str], torn: Callable[[str], None]) -> None:
        await _watch.watch(bridge, tables, torn)

    async def _visit(self, call: Callable[..., T], *args: object) -> T:
        def visit() -> T:
            # Imported here, as most daemons have no use for it, and it takes a quarter of a second.
            from pyroute2 import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError

            try:
                with IPRoute() as ipr:
                    return call(ipr, *args)
            except NetlinkError as error:
                raise _failure("the host's networks can't be looked at", error.code) from error
            except OSError as error:
                raise _failure("the host's networks can't be looked at", error.errno or 0) from error

        try:
            with trio.fail_after(_TIMEOUT_S):
                return await trio.to_thread.run_sync(visit, abandon_on_cancel=True, limiter=self._turn)
        except trio.TooSlowError:
            raise NetworkFailed("timeout", f"the host's networks did not answer within {_TIMEOUT_S:g} s") from None


def _failure(what: str, code: int, why: str = "tap") -> NetworkFailed:
    if code in (errno.EPERM, errno.EACCES):
        return NetworkFailed(
            "not_allowed", f"{what}: {os.strerror(code)}; the daemon needs to be root, or to have CAP_NET_ADMIN"
        )
    return NetworkFailed(why, f"{what}: {os.strerror(code)}")


def _links(ipr: Any, names: Collection[str] | None) -> list[Link]:
    if names is None:
        messages = list(ipr.get_links())
    else:
        messages = [message for name in sorted(names) if (message := _message_of(ipr, name)) is not None]
    known = {message["index"]: message.get("ifname") for message in messages}
    return [_link(message, known) for message in messages]


def _message_of(ipr: Any, name: str) -> Any:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        (message,) = ipr.link("get", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return message


def _link(message: Any, known: dict[int, str]) -> Link:
    info = message.get("linkinfo")
    kind = (info.get("kind") if info is not None else None) or ""
    master = message.get("master")
    return Link(
        name=message.get("ifname"),
        kind=kind,
        mac=message.get("address") or "",
        up=bool(message["flags"] & _UP),
        master=known.get(master) or _name_of(master) if master else "",
        in_use=kind == "tun" and bool(message.get("carrier")),
    )


def _name_of(index: int) -> str:
    with suppress(OSError):
        return socket.if_indextoname(index)
    return ""


def _routes() -> Iterator[tuple[str, str]]:
    """Destination, empty for a way into the world, and device of each route of the main table. Read as text, as that
    costs a host with a hundred thousand of them little."""
    for line in _ROUTES.read_text().splitlines()[1:]:
        device, destination, _, _, _, _, _, mask, *_ = line.split()
        network = socket.inet_ntoa(struct.pack("=I", int(destination, 16)))
        bits = int(mask, 16).bit_count()
        yield f"{network}/{bits}" if bits else "", device


def _check_ready() -> None:
    if not may_configure_networks():
        raise NetworkFailed(
            "not_allowed", "the daemon may not change the host's networks: it needs to be root, or CAP_NET_ADMIN"
        )
    if _nftables.nft() is None:
        raise NetworkFailed("firewall", _nftables.MISSING)
    if not TUN.exists():
        raise NetworkFailed("tap", f"there is no {TUN}; `modprobe tun` makes it")
    switch = _SYSCTL / "ipv4/conf/default/forwarding"
    try:
        is_on = switch.read_text().strip() == "1"
    except OSError as error:
        raise NetworkFailed("forwarding", f"the host has no IPv4: {error}") from error
    if not is_on and not os.access(switch, os.W_OK):
        raise NetworkFailed("forwarding", _FORWARDING.format(where="ip_forward", why="it can't be written to"))


def may_configure_networks() -> bool:
    """Returns whether the daemon has CAP_NET_ADMIN."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return False


def _do_all(ipr: Any, steps: Sequence[Step]) -> list[NetworkFailed | None]:
    from pyroute2.netlink.exceptions import NetlinkError

    done: list[NetworkFailed | None] = []
    for step in steps:
        failed: NetworkFailed | None = None
        try:
            _do(ipr, step)
        except NetworkFailed as error:
            failed = error
        except NetlinkError as error:
            failed = _failure(_said(step), error.code)
        except OSError as error:
            failed = _failure(_said(step), error.errno or 0)
        done.append(failed)
    return done


def _said(step: Step) -> str:
    match step:
        case MakeBridge(name=name):
            return f"the bridge {name} can't be made"
        case MakeTap(name=name, bridge=bridge):
            return f"the tap {name} on the bridge {bridge} can't be made"
        case RemoveLink(name=name):
            return f"the network interface {name} can't be removed"
        case ForgetConnections(address=address):
            return f"connections of {address} can't be forgotten"
        case SetLocalnet(bridge=bridge):
            return f"net.ipv4.conf.{bridge}.route_localnet can't be set"


def _do(ipr: Any, step: Step) -> None:
    match step:
        case MakeBridge():
            _make_bridge(ipr, step)
        case MakeTap():
            _make_tap(ipr, step)
        case RemoveLink(name=name, kind=kind):
            if (message := _message_of(ipr, name)) is not None and _link(message, {}).kind == kind:
                ipr.link("del", index=message["index"])
        case ForgetConnections(address=address):
            forget_connections(address)
        case SetLocalnet(bridge=bridge, on=on):
            try:
                _switch(f"ipv4/conf/{bridge}/route_localnet", on)
            except FileNotFoundError as error:
                raise BridgeDown(bridge) from error


def _make_bridge(ipr: Any, step: MakeBridge) -> None:
    message = _message_of(ipr, step.name)
    if message is None:
        # A frame's way is decided at once: no spanning tree, no learning who wants which multicast.
        ipr.link(
            "add",
            ifname=step.name,
            kind="bridge",
            address=step.mac,
            br_stp_state=0,
            br_forward_delay=0,
            br_mcast_snooping=0,
        )
        message = _message_of(ipr, step.name)
    index = message["index"]
    _no_ipv6(step.name)
    there = {
        f"{address.get('local') or address.get('address')}/{address['prefixlen']}": address
        for address in ipr.get_addr(family=socket.AF_INET, index=index)
    }
    for address in step.addresses:
        if address not in there:
            ip, _, prefix = address.partition("/")
            ipr.addr("add", index=index, address=ip, prefixlen=int(prefix))
    for address in there.keys() - set(step.addresses):
        ip, _, prefix = address.partition("/")
        ipr.addr("del", index=index, address=ip, prefixlen=int(prefix))
    ipr.link("set", index=index, state="up")
    _forward(step.name)


def _forward(bridge: str) -> None:
    # Of a route that refuses, the device is a star.
    uplinks = {device for destination, device in _routes() if not destination and device != "*"}
    for name in (bridge, *sorted(uplinks)):
        try:
            _switch(f"ipv4/conf/{name}/forwarding", True)
        except OSError as error:
            where = f"conf.{name}.forwarding"
            raise NetworkFailed("forwarding", _FORWARDING.format(where=where, why=error.strerror)) from error


def _make_tap(ipr: Any, step: MakeTap) -> None:
    bridge = _index_of_bridge(step.bridge)
    try:
        tun = open_tap(step.name)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise NetworkFailed(
                "tap", f"there is a network interface {step.name} that is no tap, where one is to be; remove it"
            ) from error
        if error.errno != errno.EBUSY:
            raise
        # A hypervisor has it open, so it exists and is permanent.
        _join(ipr, socket.if_nametoindex(step.name), bridge)
        return
    try:
        _no_ipv6(step.name)
        _join(ipr, socket.if_nametoindex(step.name), bridge)
        make_permanent(tun, os.geteuid())
    finally:
        os.close(tun)


def _index_of_bridge(name: str) -> int:
    """:raises BridgeDown:"""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
        index = socket.if_nametoindex(name)
    except OSError as error:
        raise BridgeDown(name) from error
    if not struct.unpack_from("H", answer, 16)[0] & _UP:
        raise BridgeDown(name)
    return index


def _join(ipr: Any, index: int, bridge: int) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        ipr.link("set", index=index, master=bridge, state="up")
    except NetlinkError as error:
        if error.code == errno.EXFULL:
            raise NetworkFailed("tap", "the bridge has 1023 ports, and Linux gives it no more") from error
        raise


def _no_ipv6(name: str) -> None:
    """An interface that no guest's IPv6 gets through needs no address of its own, nor to look for others with one. That
    is quieter, and no more: where there is no such switch, or it can't be turned, it stays as it is."""
    with suppress(OSError):
        _switch(f"ipv6/conf/{name}/disable_ipv6", True)


def _switch(path: str, on: bool) -> None:
    file = _SYSCTL / path
    wanted = str(int(on))
    if file.read_text().strip() != wanted:
        file.write_text(wanted)
