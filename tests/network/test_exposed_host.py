"""A guest reaches no service of the host: not by broadcast or multicast, not by its addresses, loopback or metadata.

The same datagrams from a machine that is not a guest arrive, which shows that the services listen.
"""

from __future__ import annotations

import socket
import struct

import pytest

from tests.attackers.exposed_host import (
    LOOPBACK_PORT,
    METADATA,
    MULTICAST_GROUPS,
    MULTICAST_GROUPS_IPV6,
    PORT,
    exposed_host,
)
from tests.network import peer
from tests.network.kit import (
    SETTINGS,
    UPLINK,
    Peer,
    World,
    a_world,
    address,
    ethernet,
    having,
    mac,
    switch,
    vm,
    with_vm,
)

pytestmark = pytest.mark.usefixtures("namespace")

GATEWAY = "10.87.0.1"
ALL = "ff:ff:ff:ff:ff:ff"
BROADCAST = ("255.255.255.255", "10.87.0.255")


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def udp(to: str, sender: str, text: str, port: int = PORT) -> bytes:
    body = struct.pack("!HHHH", 40000, port, 8 + len(text), 0) + text.encode()
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_UDP, 0)
    header += socket.inet_aton(sender) + socket.inet_aton(to)
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def udp_ipv6(to: str, text: str) -> bytes:
    source, target = socket.inet_pton(socket.AF_INET6, "fe80::99"), socket.inet_pton(socket.AF_INET6, to)
    length = 8 + len(text)
    body = struct.pack("!HHHH", 40000, PORT, length, 0) + text.encode()
    summed = source + target + struct.pack("!II", length, socket.IPPROTO_UDP) + body + b"\0" * (length % 2)
    body = body[:6] + struct.pack("!H", checksum(summed) or 0xFFFF) + body[8:]
    return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + source + target + body


def multicast_mac(group: str) -> str:
    packed = socket.inet_aton(group)
    return f"01:00:5e:{packed[1] & 0x7F:02x}:{packed[2]:02x}:{packed[3]:02x}"


def say_everywhere(sender: Peer, *more: str) -> None:
    for target in ("255.255.255.255", *more, *MULTICAST_GROUPS):
        assert sender("say", target, PORT, f"to {target}"), target


def serve_metadata(world: World, address: str, port: int) -> None:
    """A cloud's own service, one hop away."""
    cloud = world.machine("cloud0", "203.0.113.1/24", "203.0.113.2/24")
    cloud("add_address", "eth0", f"{address}/32")
    for protocol in ("tcp", "udp"):
        cloud("serve", protocol, address, port, "secrets")
    peer.route(f"{address}/32", "203.0.113.2")


async def test_a_guest_reaches_no_service_of_the_host_by_broadcast_or_multicast() -> None:
    with a_world(forwarding=True) as world:
        _, guest = await with_vm(world)
        with exposed_host([GATEWAY, UPLINK]) as services:
            say_everywhere(world.world, "198.51.100.255")
            assert len(services.received()) == 2 + len(MULTICAST_GROUPS), "the services hear"

            say_everywhere(guest, "10.87.0.255", "198.51.100.255", GATEWAY, UPLINK)
            assert guest("ping", GATEWAY)

            assert services.received() == []


async def test_a_guest_with_crafted_frames_reaches_no_service_of_the_host() -> None:
    with a_world(forwarding=True) as world:
        # Its loopback is routed while a port is published there.
        (row,) = world.rows = [vm(1, "bridge", "127.0.0.1:8080:80")]
        await having(world.networks(), row)
        assert switch(f"ipv4/conf/{SETTINGS.bridge_name}/route_localnet") == "1"
        switch(f"ipv6/conf/{SETTINGS.bridge_name}/disable_ipv6", "0")
        guest = world.guest(row)
        own, bridge = mac(row), SETTINGS.bridge_mac
        targets = (*BROADCAST, *MULTICAST_GROUPS, GATEWAY, UPLINK)
        frames = [
            ethernet(to, own, 0x0800, udp(target, address(row), f"{target} in a frame to {to}"))
            for target in targets
            for to in (ALL, bridge, multicast_mac("224.0.0.1"))
        ]
        frames += [
            ethernet(to, own, 0x0800, udp("127.0.0.1", address(row), "loopback", LOOPBACK_PORT)) for to in (ALL, bridge)
        ]
        # As a DHCP client does.
        frames += [ethernet(ALL, own, 0x0800, udp(target, "0.0.0.0", "no address")) for target in BROADCAST]
        frames += [
            ethernet(to, own, 0x86DD, udp_ipv6(group, f"IPv6 to {group}"))
            for group in MULTICAST_GROUPS_IPV6
            for to in ("33:33:00:00:00:01", bridge)
        ]
        with exposed_host([GATEWAY, UPLINK], [SETTINGS.bridge_name]) as services:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as own_socket:
                own_socket.sendto(b"heard", ("::1", PORT))
            assert services.received() == ["heard"], "the services hear IPv6 too"

            guest("send_frame", *frames)
            assert guest("ping", GATEWAY)

            assert services.received() == []


async def test_a_guest_opens_no_connection_to_the_host() -> None:
    with a_world() as world:
        row, other = world.rows = [vm(1, "bridge", "127.0.0.1:8080:80"), vm(2, "bridge", "0.0.0.0:8081:80")]
        await having(world.networks(), row, other)
        guest = world.guest(row)
        with exposed_host([GATEWAY, UPLINK]) as services:
            assert peer.ask("tcp", UPLINK, PORT) == "exposed"
            assert services.received() == [f"tcp {PORT}"]

            for target in (GATEWAY, UPLINK, "10.87.0.255", "255.255.255.255", "0.0.0.0"):
                assert guest("refused", "tcp", target, PORT), target
            assert guest("refused", "tcp", UPLINK, 8081), "what another guest publishes is no way round isolation"

            assert services.received() == []


@pytest.mark.parametrize("metadata", METADATA)
async def test_a_guest_reaches_no_cloud_metadata_service(metadata: str) -> None:
    with a_world(forwarding=True) as world:
        serve_metadata(world, metadata, 80)
        _, guest = await with_vm(world)

        for protocol in ("tcp", "udp"):
            assert peer.ask(protocol, metadata, 80).startswith("secrets")
            assert guest("refused", protocol, metadata, 80)


async def test_guests_on_azure_reach_its_dns_server() -> None:
    with a_world(forwarding=True) as world:
        serve_metadata(world, "168.63.129.16", 53)
        _, guest = await with_vm(world)

        for protocol in ("tcp", "udp"):
            assert guest("ask", protocol, "168.63.129.16", 53).startswith("secrets")


async def test_guests_of_one_network_still_reach_each_other_by_broadcast_and_multicast() -> None:
    with a_world() as world:
        one, two = world.rows = [vm(1, "blue"), vm(2, "blue")]
        await having(world.networks(), one, two)
        sender, receiver = world.guest(one), world.guest(two)

        for target in ("255.255.255.255", "10.87.0.255", "224.0.0.251"):
            assert sender("say", target, PORT, f"to {target}")
            assert receiver("wait_for_frame", f"to {target}".encode().hex())
