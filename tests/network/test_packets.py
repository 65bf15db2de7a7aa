"""What guests reach and what reaches guests, with real taps, a real firewall and namespaces as guests.

To show that a packet does not arrive, the tests send an allowed one after it on the same way, which arrives.
"""

from __future__ import annotations

import socket
import struct

import pytest
from pyroute2 import NFCTSocket

from tests.network import peer
from tests.network.kit import (
    SETTINGS,
    UPLINK,
    WORLD,
    a_world,
    address,
    ethernet,
    having,
    links,
    mac,
    stopped,
    switch,
    vm,
    with_vm,
)

pytestmark = pytest.mark.usefixtures("namespace")

GATEWAY = "10.87.0.1"
ALL = "ff:ff:ff:ff:ff:ff"
NOBODY = "02:00:00:00:00:99"
FIRST, SECOND, THIRD = b"the first".hex(), b"the second".hex(), b"the third".hex()


def ipv4(to: str, sender: str, text: str, port: int = 9) -> bytes:
    """Returns a UDP packet to port 9 with this text, in hexadecimal digits."""
    body = struct.pack("!HHHH", port, 9, 8 + len(text) // 2, 0) + bytes.fromhex(text)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_UDP, 0)
    header += socket.inet_aton(sender) + socket.inet_aton(to)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + body


def arp(sender_mac: str, sender: str, wanted: str) -> bytes:
    """Returns an ARP request for `wanted`."""
    return (
        struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
        + bytes.fromhex(sender_mac.replace(":", ""))
        + socket.inet_aton(sender)
        + bytes(6)
        + socket.inet_aton(wanted)
    )


async def test_a_guest_reaches_its_gateway_and_the_world_with_the_hosts_address() -> None:
    with a_world() as world:
        _, guest = await with_vm(world)
        world.world("serve", "tcp", WORLD, 80, "web")
        world.world("serve", "udp", WORLD, 53, "names")

        assert guest("ping", GATEWAY)
        assert guest("ping", WORLD)
        assert guest("ask", "tcp", WORLD, 80) == f"web {UPLINK}"
        assert guest("ask", "udp", WORLD, 53) == f"names {UPLINK}"


async def test_the_host_does_not_route_for_its_other_networks() -> None:
    with a_world() as world:
        world.machine("other0", "203.0.113.1/24", "203.0.113.2/24")
        world.rows = [vm(1)]
        await having(world.networks(), *world.rows)

        on = {name for name in links() if switch(f"ipv4/conf/{name}/forwarding") == "1"}

        assert on == {"up0", SETTINGS.bridge_name}
        assert switch("ipv4/ip_forward") == "0"


@pytest.mark.parametrize("is_router", [False, True])
async def test_the_world_reaches_no_other_network_of_the_host(is_router: bool) -> None:
    with a_world(forwarding=is_router) as world:
        other = world.machine("other0", "203.0.113.1/24", "203.0.113.2/24")
        other("route", "0.0.0.0/0", "203.0.113.1")
        other("serve", "tcp", "203.0.113.2", 80, "other")
        world.world("route", "203.0.113.0/24", UPLINK)
        await with_vm(world)
        # As if the operator had chosen so for this interface.
        switch("ipv4/conf/other0/forwarding", "1")

        if is_router:
            assert world.world("ask", "tcp", "203.0.113.2", 80) == f"other {WORLD}"
        else:
            assert world.world("refused", "tcp", "203.0.113.2", 80)
        # The other direction is the operator's.
        world.world("serve", "tcp", WORLD, 80, "web")
        assert other("ask", "tcp", WORLD, 80) == "web 203.0.113.2"


async def test_the_world_reaches_no_guest_even_with_a_route() -> None:
    with a_world(forwarding=True) as world:
        row, guest = await with_vm(world)
        guest("serve", "tcp", "0.0.0.0", 80, "guest")
        world.world("route", "10.87.0.0/24", UPLINK)

        assert peer.ask("tcp", address(row), 80) == f"guest {GATEWAY}"
        assert world.world("refused", "tcp", address(row), 80)


async def test_guests_reach_each_other_only_in_the_same_named_network() -> None:
    with a_world() as world:
        one, two, other, alone, too = world.rows = [
            vm(1, "blue"),
            vm(2, "blue"),
            vm(3, "green"),
            vm(4, "bridge"),
            vm(5, "bridge"),
        ]
        await having(world.networks(), *world.rows)
        guests = {row.name: world.guest(row) for row in world.rows}
        for name, guest in guests.items():
            guest("serve", "tcp", "0.0.0.0", 80, name)

        assert guests["vm1"]("ask", "tcp", address(two), 80) == f"vm2 {address(one)}"
        assert guests["vm2"]("ping", address(one))
        for here, there in ((one, other), (other, one), (one, alone), (alone, one), (alone, too), (too, alone)):
            assert guests[here.name]("refused", "tcp", address(there), 80), f"{here.name} reaches {there.name}"
        for guest in guests.values():
            assert guest("ping", GATEWAY)


async def test_isolated_guests_do_not_meet_by_the_gateway_or_by_broadcast() -> None:
    with a_world(forwarding=True) as world:
        one, two = world.rows = [vm(1, "blue"), vm(2, "green")]
        await having(world.networks(), *world.rows)
        sender, receiver = world.guest(one), world.guest(two)

        sender("send_frame", ethernet(SETTINGS.bridge_mac, mac(one), 0x0800, ipv4(address(two), address(one), FIRST)))
        sender("send_frame", ethernet(mac(two), mac(one), 0x0800, ipv4(address(two), address(one), FIRST)))
        sender("send_frame", ethernet(ALL, mac(one), 0x0800, ipv4("10.87.0.255", address(one), FIRST)))
        sender("send_frame", ethernet(ALL, mac(one), 0x0806, arp(mac(one), address(one), address(two))))
        assert sender("ping", GATEWAY)
        send_from_host(address(two), SECOND)

        assert receiver("wait_for_frame", SECOND)
        assert not receiver("has_frame", FIRST)
        assert not receiver("has_frame", socket.inet_aton(address(one)).hex())


async def test_a_guest_receives_no_packets_for_another_guest() -> None:
    with a_world() as world:
        one, two, _ = world.rows = [vm(1, "blue"), vm(2, "blue"), vm(3, "blue")]
        await having(world.networks(), *world.rows)
        guests = [world.guest(row) for row in world.rows]
        assert guests[0]("ping", address(two))

        # The bridge does not know this address, and would flood the frame.
        guests[0]("send_frame", ethernet(NOBODY, mac(one), 0x0800, ipv4("10.87.0.9", address(one), FIRST)))
        guests[0]("send_frame", ethernet(mac(two), mac(one), 0x0800, ipv4(address(two), address(one), SECOND)))
        guests[0]("send_frame", ethernet(ALL, mac(one), 0x0800, ipv4("10.87.0.255", address(one), THIRD)))

        assert guests[1]("wait_for_frame", THIRD)
        assert guests[2]("wait_for_frame", THIRD)
        assert guests[1]("has_frame", SECOND)
        assert not guests[2]("has_frame", SECOND)
        assert not guests[1]("has_frame", FIRST)
        assert not guests[2]("has_frame", FIRST)


async def test_foreign_ports_of_the_bridge_and_guests_are_isolated() -> None:
    with a_world() as world:
        (row,) = world.rows = [vm(1)]
        await having(world.networks(), row)
        guest, foreign = world.guest(row), world.foreign_port("foreign0", NOBODY, "10.87.0.200/24")

        guest("send_frame", ethernet(ALL, mac(row), 0x0800, ipv4("10.87.0.255", address(row), FIRST)))
        foreign("send_frame", ethernet(mac(row), NOBODY, 0x0800, ipv4(address(row), "10.87.0.200", FIRST)))
        send_from_host("10.87.0.200", SECOND)
        send_from_host(address(row), SECOND)

        for each in (guest, foreign):
            assert each("wait_for_frame", SECOND)
            assert not each("has_frame", FIRST)


@pytest.mark.parametrize("what", ["mac", "address", "arp mac", "arp address", "ipv6", "tagged"])
async def test_a_guest_cannot_spoof_another_guest(what: str) -> None:
    with a_world() as world:
        one, two, victim = world.rows = [vm(1, "blue"), vm(2, "blue"), vm(3, "blue")]
        await having(world.networks(), *world.rows)
        sender, receiver = world.guest(one), world.guest(two)
        marker = socket.inet_aton("10.87.0.77").hex()
        lie = {
            "mac": ethernet(mac(two), mac(victim), 0x0800, ipv4(address(two), address(one), FIRST)),
            "address": ethernet(mac(two), mac(one), 0x0800, ipv4(address(two), address(victim), FIRST)),
            "arp mac": ethernet(ALL, mac(one), 0x0806, arp(mac(victim), address(one), "10.87.0.77")),
            "arp address": ethernet(ALL, mac(one), 0x0806, arp(mac(one), address(victim), "10.87.0.77")),
            "ipv6": ethernet(mac(two), mac(one), 0x86DD, bytes.fromhex(FIRST).rjust(60, b"\0")),
            "tagged": ethernet(mac(two), mac(one), 0x8100, b"\0\7\x08\0" + ipv4(address(two), address(one), FIRST)),
        }[what]

        sender("send_frame", lie)
        sender("send_frame", ethernet(mac(two), mac(one), 0x0800, ipv4(address(two), address(one), SECOND)))
        sender("send_frame", ethernet(ALL, mac(one), 0x0806, arp(mac(one), address(one), address(two))))

        assert receiver("wait_for_frame", SECOND)
        assert not receiver("has_frame", FIRST)
        assert not receiver("has_frame", marker)
        assert neighbour(address(victim)) in ("", mac(victim))


async def test_a_guest_cannot_poison_the_hosts_arp_table() -> None:
    with a_world() as world:
        one, victim = world.rows = [vm(1), vm(2)]
        await having(world.networks(), *world.rows)
        liar, honest = world.guest(one), world.guest(victim)
        honest("serve", "udp", "0.0.0.0", 7, "honest")
        assert peer.ask("udp", address(victim), 7) == f"honest {GATEWAY}"

        liar("send_frame", ethernet(SETTINGS.bridge_mac, mac(one), 0x0806, arp(mac(one), address(victim), GATEWAY)))
        liar("send_frame", ethernet(SETTINGS.bridge_mac, mac(victim), 0x0806, arp(mac(victim), address(one), GATEWAY)))
        assert liar("ping", GATEWAY)

        assert neighbour(address(victim)) == mac(victim)
        assert neighbour(address(one)) == mac(one)
        assert peer.ask("udp", address(victim), 7) == f"honest {GATEWAY}"


async def test_published_ports_answer_from_outside_and_from_the_host() -> None:
    with a_world() as world:
        world.rows = [
            vm(1, "bridge", "127.0.0.1:8080:80/tcp", "0.0.0.0:5353:53/udp"),
            vm(2, "bridge", f"{UPLINK}:8081:80/tcp"),
        ]
        await having(world.networks(), *world.rows)
        for row in world.rows:
            guest = world.guest(row)
            guest("serve", "tcp", "0.0.0.0", 80, row.name)
            guest("serve", "udp", "0.0.0.0", 53, row.name)

        assert peer.ask("tcp", "127.0.0.1", 8080) == f"vm1 {GATEWAY}"
        assert peer.ask("udp", "127.0.0.1", 5353) == f"vm1 {GATEWAY}"
        assert peer.ask("tcp", UPLINK, 8081) == f"vm2 {UPLINK}"
        assert world.world("ask", "tcp", UPLINK, 8081) == f"vm2 {WORLD}"
        assert world.world("ask", "udp", UPLINK, 5353) == f"vm1 {WORLD}"
        assert world.world("refused", "tcp", UPLINK, 8080), "what is published on 127.0.0.1 is the host's alone"
        assert peer.refused("tcp", "127.0.0.1", 8081)


async def test_a_port_is_published_for_as_long_as_its_vm_runs() -> None:
    with a_world() as world:
        networks = world.networks()
        one, two = vm(1, "bridge", "127.0.0.1:8080:80"), vm(2)
        world.rows = [one, two]
        await having(networks, one, two)
        world.guest(one)("serve", "tcp", "0.0.0.0", 80, "vm1")
        assert peer.ask("tcp", "127.0.0.1", 8080) == f"vm1 {GATEWAY}"

        world.rows = [two]
        await having(networks, one)

        assert peer.refused("tcp", "127.0.0.1", 8080)
        assert switch(f"ipv4/conf/{SETTINGS.bridge_name}/route_localnet") == "0"


async def test_connections_survive_changes_of_other_vms() -> None:
    with a_world() as world:
        networks = world.networks()
        world.rows = [vm(1)]
        await having(networks, *world.rows)
        guest = world.guest(world.rows[0])
        world.world("echo", WORLD, 80)
        guest("begin", WORLD, 80)

        for number in range(2, 12):
            world.rows = [vm(1), vm(number, "blue", f"127.0.0.1:{8000 + number}:80")]
            await having(networks, world.rows[-1])
            assert guest("go_on") == "again"
        await networks.reconcile()

        assert guest("go_on") == "again"


async def test_guests_reach_each_other_with_bridge_netfilter() -> None:
    name = "bridge/bridge-nf-call-iptables"
    if switch(name) is None:
        pytest.skip("this kernel has no br_netfilter")
    with a_world() as world:
        switch(name, "1")
        one, two, _ = world.rows = [vm(1, "blue", "127.0.0.1:8080:80"), vm(2, "blue"), vm(3)]
        await having(world.networks(), *world.rows)
        first, second, third = (world.guest(row) for row in world.rows)
        first("serve", "tcp", "0.0.0.0", 80, "vm1")
        world.world("serve", "tcp", WORLD, 80, "web")

        assert second("ask", "tcp", address(one), 80) == f"vm1 {address(two)}"
        assert third("refused", "tcp", address(one), 80)
        assert third("ask", "tcp", WORLD, 80) == f"web {UPLINK}"
        assert peer.ask("tcp", "127.0.0.1", 8080) == f"vm1 {GATEWAY}"


async def test_a_vm_gets_no_packets_of_an_earlier_vm_with_its_address() -> None:
    with a_world() as world:
        networks = world.networks()
        gone, stays = world.rows = [vm(1, "bridge", "0.0.0.0:8080:53/udp"), vm(2)]
        await having(networks, *world.rows)
        for row in world.rows:
            guest = world.guest(row)
            world.world("echo", WORLD, 80 + row.id)
            guest("begin", WORLD, 80 + row.id)
            guest("serve", "udp", "0.0.0.0", 53, "vm")
        assert world.world("ask", "udp", UPLINK, 8080).startswith("vm ")
        assert {address(gone), address(stays)} <= tracked()

        world.rows = [stopped(gone), stays]
        await having(networks, gone)
        assert address(gone) not in tracked()
        assert address(stays) in tracked()


def tracked() -> set[str]:
    """Returns source and destination of the connections that this namespace tracks."""
    found = set()
    with NFCTSocket() as netlink:
        for entry in netlink.dump():
            for kind in ("CTA_TUPLE_ORIG", "CTA_TUPLE_REPLY"):
                found.add(entry.get_attr(kind).get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC"))
    return found


async def test_one_guest_cannot_fill_the_hosts_connection_table() -> None:
    with a_world() as world:
        one, two = world.rows = [vm(1), vm(2)]
        await having(world.networks(), *world.rows)
        flood, quiet = world.guest(one), world.guest(two)
        world.world("serve", "udp", WORLD, 53, "names")

        packets = (ipv4(WORLD, address(one), FIRST, port) for port in range(20000, 30000))
        flood("send_frame", *(ethernet(SETTINGS.bridge_mac, mac(one), 0x0800, packet) for packet in packets))

        assert 8000 < int(switch("netfilter/nf_conntrack_count") or 0) < 9000
        assert quiet("ask", "udp", WORLD, 53) == f"names {UPLINK}"


def send_from_host(host: str, text: str) -> None:
    """Sends a packet from the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(bytes.fromhex(text), (host, 9))


def neighbour(host: str) -> str:
    """Returns the MAC in the host's ARP table for `host`; empty without one."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        for entry in ipr.get_neighbours(family=socket.AF_INET):
            if entry.get("dst") == host:
                return str(entry.get("lladdr") or "")
    return ""
