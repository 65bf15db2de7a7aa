"""Runs steps: bridges, links and addresses over netlink, taps by `/dev/net/tun`, switches in `/proc/sys`.

**A tap becomes permanent in its last step.** So an incomplete tap disappears with the process that was making it.

**Forwarding** is a switch of the interface that a packet arrives on. It is turned on for the bridge and, for the
answers, for the interfaces of the host's default routes; other interfaces stay as they are. The firewall drops packets
that would continue from those to another network of the host. The switch stays on when the daemon stops, as something
else may rely on it by then. Rejected: `net.ipv4.ip_forward`, which makes the host a router for all its networks.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from volant.host import make_permanent, open_or_create_tap

from ._backend import (
    BridgeDown,
    ForgetConnections,
    Link,
    MakeBridge,
    MakeTap,
    NetworkFailed,
    RemoveLink,
    SetLocalnet,
    Step,
)

# Removes the connections of an address from the host's connection tracking.
#
# A deleted VM's entries would stay for up to five days, and the next VM with its address would get packets of
# connections that it never had. The kernel selects the entries (a delete request with a tuple and `CTA_FILTER`), so the
# cost does not grow with the host's table. pyroute2 can't filter, hence the few lines of netlink.


_NETFILTER = 12
_DELETE = 1 << 8 | 2
"""NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE."""
_REQUEST_ACK = 1 | 4
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _FILTER = 1, 2, 25
_IP, _V4_SRC = 1, 1
_ORIG_FLAGS, _REPLY_FLAGS = 1, 2
_BY_SOURCE = 1
_ANSWER_S = 5.0


def forget_connections(address: str) -> None:
    """Removes the connections from and to `address`.

    A kernel that can't filter refuses the request and keeps the entries until they expire (before Linux 6.11).

    :raises OSError: when the kernel refuses for another reason, or does not answer within 5 s.
    """
    packed = ipaddress.IPv4Address(address).packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as netlink:
        netlink.settimeout(_ANSWER_S)
        # The client is the source of the first packet, the server the source of the first answer.
        for kind, orig, reply in ((_TUPLE_ORIG, _BY_SOURCE, 0), (_TUPLE_REPLY, 0, _BY_SOURCE)):
            source = _attribute(kind | _NESTED, _attribute(_IP | _NESTED, _attribute(_V4_SRC, packed)))
            flags = _attribute(_ORIG_FLAGS, struct.pack("=I", orig)) + _attribute(
                _REPLY_FLAGS, struct.pack("=I", reply)
            )
            body = struct.pack("=BBH", socket.AF_INET, 0, 0) + source + _attribute(_FILTER | _NESTED, flags)
            netlink.send(struct.pack("=IHHII", 16 + len(body), _DELETE, _REQUEST_ACK, 1, 0) + body)
            code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
            if code not in (0, errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


SYSCTL = Path("/proc/sys/net")
_ROUTES = Path("/proc/self/net/route")
_SIOCGIFFLAGS = 0x8913
_UP = 0x1


def run_steps(ipr: Any, steps: Sequence[Step]) -> list[NetworkFailed | None]:
    """Runs all steps in order, even when one fails. Returns the failure of each."""
    from pyroute2.netlink.exceptions import NetlinkError

    results: list[NetworkFailed | None] = []
    for step in steps:
        failed: NetworkFailed | None = None
        try:
            _run(ipr, step)
        except NetworkFailed as error:
            failed = error
        except NetlinkError as error:
            failed = failure(_what_failed(step), error.code)
        except OSError as error:
            failed = failure(_what_failed(step), error.errno or 0)
        results.append(failed)
    return results


def failure(what: str, code: int) -> NetworkFailed:
    """Returns the error for an errno."""
    if code in (errno.EPERM, errno.EACCES):
        return NetworkFailed(
            "not_allowed", f"{what}: {os.strerror(code)}; run the daemon as root or with CAP_NET_ADMIN"
        )
    return NetworkFailed("tap", f"{what}: {os.strerror(code)}")


def forwarding_failure(switch: str, why: str | None) -> NetworkFailed:
    """Returns the error for a switch below `net.ipv4` that can't be turned on."""
    return NetworkFailed(
        "forwarding",
        f"net.ipv4.{switch} is off and can't be turned on ({why}), so packets of guests would not leave this host; run "
        "`sysctl -w net.ipv4.ip_forward=1` on the host and set it in a file in /etc/sysctl.d",
    )


def get_link(ipr: Any, name: str) -> Any:
    """Returns netlink's message about a link; None if it does not exist."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        (message,) = ipr.link("get", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return message


def parse_link(message: Any, names: dict[int, str]) -> Link:
    """Returns the link in netlink's message. `names` are the names of links by index, as far as known."""
    info = message.get("linkinfo")
    kind = (info.get("kind") if info is not None else None) or ""
    master = message.get("master")
    return Link(
        name=message.get("ifname"),
        kind=kind,
        mac=message.get("address") or "",
        up=bool(message["flags"] & _UP),
        master=names.get(master) or _name_of(master) if master else "",
        in_use=kind == "tun" and bool(message.get("carrier")),
    )


def _name_of(index: int) -> str:
    with suppress(OSError):
        return socket.if_indextoname(index)
    return ""


def read_routes() -> Iterator[tuple[str, str]]:
    """Yields destination, empty for a default route, and device of each route in the main table.

    Reads the table as text, which stays cheap on hosts with a hundred thousand routes.
    """
    for line in _ROUTES.read_text().splitlines()[1:]:
        device, destination, _, _, _, _, _, mask, *_ = line.split()
        network = socket.inet_ntoa(struct.pack("=I", int(destination, 16)))
        bits = int(mask, 16).bit_count()
        yield f"{network}/{bits}" if bits else "", device


def read_uplinks() -> list[str]:
    """Returns the interfaces of the default routes."""
    # The device of a reject route is `*`.
    return sorted({device for destination, device in read_routes() if not destination and device != "*"})


def is_router() -> bool:
    """Returns whether the host routes packets between all its networks. False if that is unknown."""
    try:
        return (SYSCTL / "ipv4/ip_forward").read_text().strip() != "0"
    except OSError:
        return False


def _what_failed(step: Step) -> str:
    match step:
        case MakeBridge(name=name):
            return f"the bridge {name} can't be created"
        case MakeTap(name=name, bridge=bridge):
            return f"the tap {name} on the bridge {bridge} can't be created"
        case RemoveLink(name=name):
            return f"the network interface {name} can't be removed"
        case ForgetConnections(address=address):
            return f"tracked connections of {address} can't be removed"
        case SetLocalnet(bridge=bridge):
            return f"net.ipv4.conf.{bridge}.route_localnet can't be set"


def _run(ipr: Any, step: Step) -> None:
    match step:
        case MakeBridge():
            _make_bridge(ipr, step)
        case MakeTap():
            _make_tap(ipr, step)
        case RemoveLink(name=name, kind=kind):
            if (message := get_link(ipr, name)) is not None and parse_link(message, {}).kind == kind:
                ipr.link("del", index=message["index"])
        case ForgetConnections(address=address):
            forget_connections(address)
        case SetLocalnet(bridge=bridge, on=on):
            try:
                _switch(f"ipv4/conf/{bridge}/route_localnet", on)
            except FileNotFoundError as error:
                raise BridgeDown(bridge) from error


def _make_bridge(ipr: Any, step: MakeBridge) -> None:
    message = get_link(ipr, step.name)
    if message is None:
        # Without spanning tree and multicast snooping, ports forward at once.
        ipr.link(
            "add",
            ifname=step.name,
            kind="bridge",
            address=step.mac,
            br_stp_state=0,
            br_forward_delay=0,
            br_mcast_snooping=0,
        )
        message = get_link(ipr, step.name)
    index = message["index"]
    _no_ipv6(step.name)
    current = {
        f"{address.get('local') or address.get('address')}/{address['prefixlen']}"
        for address in ipr.get_addr(family=socket.AF_INET, index=index)
    }
    wanted = set(step.addresses)
    for command, addresses in (("add", wanted - current), ("del", current - wanted)):
        for address in sorted(addresses):
            ip, _, prefix = address.partition("/")
            ipr.addr(command, index=index, address=ip, prefixlen=int(prefix))
    ipr.link("set", index=index, state="up")
    _forward(step.name)


def _forward(bridge: str) -> None:
    for name in (bridge, *read_uplinks()):
        try:
            _switch(f"ipv4/conf/{name}/forwarding", True)
        except OSError as error:
            raise forwarding_failure(f"conf.{name}.forwarding", error.strerror) from error


def _make_tap(ipr: Any, step: MakeTap) -> None:
    bridge = _index_of_bridge(step.bridge)
    try:
        tun = open_or_create_tap(step.name)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise NetworkFailed(
                "tap", f"the network interface {step.name} is not a tap, although its name is reserved; remove it"
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
    """Returns the index of the bridge. :raises BridgeDown: it is missing or down."""
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
            raise NetworkFailed("tap", "the bridge has 1023 ports, which is Linux's limit") from error
        raise


def _no_ipv6(name: str) -> None:
    """Disables IPv6, if possible. A guest can't use IPv6 here, so this only avoids useless packets of the host."""
    with suppress(OSError):
        _switch(f"ipv6/conf/{name}/disable_ipv6", True)


def _switch(path: str, on: bool) -> None:
    file = SYSCTL / path
    wanted = str(int(on))
    if file.read_text().strip() != wanted:
        file.write_text(wanted)
