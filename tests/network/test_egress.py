"""Egress rules in real kernels: guests on a bridge and passts reach what their rules allow, and nothing else.

The world has public addresses and a DNS server under the test's control. Guests are programs that send what they like.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.query
import msgspec
import pytest
import trio

from tests.network.kit import (
    INSTANCE,
    PASST_USER,
    RESTRICTED_USERS,
    SETTINGS,
    UPLINK,
    VM_USERS,
    WORLD,
    Peer,
    World,
    a_world,
    address,
    answered,
    having,
    keeper,
    nft,
    of_user,
    ruleset,
    stopped,
    user_vm,
    vm,
)
from volant.egress import EgressActivity, HostDns, VmResolvers
from volant.host import Host, user_of_images
from volant.model import VmRow, parse_egress_texts
from volant.network import HostNetwork, NetworkFailed, Networks, Passt
from volant.network.messages import Attach, Confine

pytestmark = pytest.mark.usefixtures("namespace")

GATEWAY = "10.87.0.1"
FIRST, SECOND, THIRD = "45.0.0.1", "45.0.0.2", "45.0.0.3"
"""Public addresses of the world."""
_S = 20.0


class Egress:
    """A daemon's networks with resolvers."""

    def __init__(self, world: World, root: Path) -> None:
        self.world = world
        self.passt = Passt(Host(), root, INSTANCE, PASST_USER, RESTRICTED_USERS)
        self.resolvers = VmResolvers(HostDns(), (WORLD,), self._allow)
        self.networks: Networks = world.networks(passt=self.passt, resolvers=self.resolvers)
        self.activity = EgressActivity(self.networks.egress, self.resolvers)

    async def _allow(self, vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        await self.networks.egress.allow(vm_id, name, addresses)


@asynccontextmanager
async def egress(world: World, root: Path) -> AsyncIterator[Egress]:
    made = Egress(world, root)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.resolvers.keep)
        yield made
        nursery.cancel_scope.cancel()
    for row in world.rows:
        made.resolvers.close(row.id)


@asynccontextmanager
async def served(root: Path) -> AsyncIterator[tuple[World, Egress]]:
    """A world with servers at public addresses, and the networks of a daemon."""
    with a_world() as world:
        there = world.world
        for each in (FIRST, SECOND, THIRD):
            there("add_address", "eth0", f"{each}/32")
            for port in (80, 443):
                there("serve", "tcp", each, port, f"tcp {each}")
            there("serve", "udp", each, 443, f"udp {each}")
        there("dns_serve", WORLD)
        there("dns_serve", THIRD)
        there("dns_zone", ZONE)
        async with egress(world, root) as made:
            yield world, made


ZONE = {
    "allowed.example": {"a": [FIRST]},
    "other.example": {"a": [SECOND]},
    "www.wild.example": {"cname": "cdn.example"},
    "cdn.example": {"cname": "edge.example"},
    "edge.example": {"a": [FIRST]},
    "wild.example": {"a": [SECOND]},
    "private.wild.example": {"a": ["10.0.0.5"]},
    "host.wild.example": {"a": ["127.0.0.1"]},
    "metadata.wild.example": {"a": ["169.254.169.254"]},
}


def restricted(vm_id: int, *rules: str, network: str = "bridge", **fields: Any) -> VmRow:
    return vm(vm_id, network, egress=parse_egress_texts(rules), **fields)


def behind_passt(vm_id: int, *rules: str) -> VmRow:
    return user_vm(vm_id, egress=parse_egress_texts(rules))


async def call(peer: Peer, name: str, *args: object) -> Any:
    """Runs a command on another machine, while this process answers DNS queries."""
    return await trio.to_thread.run_sync(lambda: peer(name, *args))


async def start(made: Egress, row: VmRow) -> Peer:
    made.world.rows = [row]
    await having(made.networks, row)
    return made.world.guest(row)


async def test_a_guest_reaches_what_its_rules_allow_and_nothing_else(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, made):
        guest = await start(made, restricted(1, "allowed.example:443", f"{SECOND}:80", "*.wild.example:443/udp"))

        for host in (FIRST, THIRD):
            for protocol, port in (("tcp", 80), ("tcp", 443), ("udp", 443)):
                assert await call(guest, "refused", protocol, host, port), (host, protocol, port)
            assert not await call(guest, "ping", host, 0.5)
        assert await call(guest, "ask", "tcp", SECOND, 80) == f"tcp {SECOND} {UPLINK}"
        assert await call(guest, "refused", "tcp", SECOND, 443)

        assert await call(guest, "resolve", "allowed.example", GATEWAY) == [FIRST]
        assert await call(guest, "ask", "tcp", FIRST, 443) == f"tcp {FIRST} {UPLINK}"
        assert await call(guest, "refused", "tcp", FIRST, 80), "the rule has a port"
        assert await call(guest, "refused", "udp", FIRST, 443), "the rule is for TCP"
        assert await call(guest, "resolve", "www.wild.example", GATEWAY, "A", "tcp") == [FIRST], "a chain of CNAMEs"
        assert await call(guest, "ask", "udp", FIRST, 443) == f"udp {FIRST} {UPLINK}"
        assert await call(guest, "ping", GATEWAY)


async def test_what_no_rule_allows_does_not_resolve(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        guest = await start(made, restricted(1, "allowed.example", "*.wild.example"))
        for name in ("other.example", "wild.example", "x.allowed.example", r"a\.www.wild.example", "edge.example"):
            assert await call(guest, "resolve", name, GATEWAY) == ["NXDOMAIN"], name
        # A dot inside of a label must not look like one between labels.
        assert await call(guest, "resolve", r"x\.www\.wild.example", GATEWAY) == ["NXDOMAIN"]
        assert world.world("dns_zone", {}) == [], "nobody hears of these names"
        assert await call(guest, "resolve", "allowed.example", GATEWAY, "AAAA") == ["NOERROR"]
        assert await call(guest, "resolve", "allowed.example", GATEWAY, "TXT") == ["NOERROR"]
        assert await call(guest, "resolve", "nothing.wild.example", GATEWAY) == ["NXDOMAIN"]
        assert world.world("dns_zone", {}) == ["nothing.wild.example"]


async def test_a_name_does_not_lead_to_the_host_or_a_private_network(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        guest = await start(made, restricted(1, "*.wild.example", "10.0.0.0/24:80"))
        world.world("add_address", "eth0", "10.0.0.5/32")
        world.world("serve", "tcp", "10.0.0.5", 80, "private")
        world.world("serve", "tcp", "10.0.0.5", 443, "private")
        for name in ("host", "metadata"):
            assert await call(guest, "resolve", f"{name}.wild.example", GATEWAY) == ["NXDOMAIN"]
        world.world("dns_zone", {"self.wild.example": {"a": [UPLINK]}})
        assert await call(guest, "resolve", "self.wild.example", GATEWAY) == ["NXDOMAIN"]
        # A rule for the network allows it, with the ports of that rule.
        assert await call(guest, "resolve", "private.wild.example", GATEWAY) == ["10.0.0.5"]
        assert await call(guest, "ask", "tcp", "10.0.0.5", 80) == f"private {UPLINK}"
        assert await call(guest, "refused", "tcp", "10.0.0.5", 443)


async def test_a_name_that_moves_is_followed_and_an_open_connection_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        world.world("echo", FIRST, 7)
        world.world("dns_zone", {"allowed.example": {"a": [FIRST], "ttl": 0}})
        row = restricted(1, "allowed.example")
        guest = await start(made, row)
        assert await call(guest, "resolve", "allowed.example", GATEWAY) == [FIRST]
        await call(guest, "begin", FIRST, 7)
        assert await call(guest, "go_on") == "again"
        world.world("dns_zone", {"allowed.example": {"a": [SECOND], "ttl": 0}})
        with trio.fail_after(_S):
            while await call(guest, "resolve", "allowed.example", GATEWAY) != [SECOND]:  # noqa: ASYNC110
                await trio.sleep(0.2)
        assert await call(guest, "ask", "tcp", SECOND, 80) == f"tcp {SECOND} {UPLINK}"
        # As if its time had passed.
        nft(f"flush set {SETTINGS.egress_table} names-1-0")
        assert await call(guest, "refused", "tcp", FIRST, 80)
        assert await call(guest, "go_on") == "again"


async def test_an_address_is_allowed_for_its_ttl_and_a_minute_at_least(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        world.world(
            "dns_zone", {"a.wild.example": {"a": [FIRST], "ttl": 2}, "b.wild.example": {"a": [SECOND], "ttl": 10**9}}
        )
        guest = await start(made, restricted(1, "*.wild.example"))
        for name in ("a", "b"):
            await call(guest, "resolve", f"{name}.wild.example", GATEWAY)
        listed = await made.networks._backend.listed(f"set {SETTINGS.egress_table} names-1-0")
        (held,) = [entry["set"] for entry in listed if "set" in entry]
        assert {each["elem"]["val"]: each["elem"]["timeout"] for each in held["elem"]} == {FIRST: 60, SECOND: 3610}


async def test_no_other_resolver_answers(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, made):
        guest = await start(made, restricted(1, "allowed.example:443"))
        for server in (WORLD, THIRD):
            for protocol in ("udp", "tcp"):
                assert await call(guest, "resolve", "allowed.example", server, "A", protocol, 1.0) == ["none"]
            assert await call(guest, "refused", "tcp", server, 853)
            assert await call(guest, "refused", "tcp", server, 443)


async def test_without_a_resolver_a_guest_reaches_no_dns_server_of_the_host(tmp_path: Path) -> None:
    with a_world() as world:
        networks = world.networks()
        row = restricted(1, "10.0.0.0/8", f"{FIRST}:80")
        world.rows = [row]
        await having(networks, row)
        guest = world.guest(row)
        with socket.create_server((GATEWAY, 53)):
            assert not await call(guest, "connects", GATEWAY, 53)
            assert await call(guest, "refused", "tcp", GATEWAY, 53)


async def test_none_lets_nothing_through_and_all_is_as_before(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        closed, open_ = world.rows = [restricted(1, "none"), vm(2)]
        await having(made.networks, closed, open_)
        guest, other = world.guest(closed), world.guest(open_)
        assert await call(guest, "refused", "tcp", FIRST, 80)
        assert not await call(guest, "ping", FIRST, 0.5)
        assert await call(guest, "resolve", "allowed.example", GATEWAY) == ["NXDOMAIN"]
        assert await call(other, "ask", "tcp", FIRST, 80) == f"tcp {FIRST} {UPLINK}"
        assert await call(other, "resolve", "allowed.example", WORLD) == [FIRST]
        assert await call(other, "resolve", "allowed.example", GATEWAY, "A", "udp", 1.0) == ["none"]


async def test_members_of_a_named_network_are_reached_whatever_the_policy(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        one, two = world.rows = [restricted(1, "none", network="blue"), vm(2, "blue")]
        await having(made.networks, one, two)
        first, second = world.guest(one), world.guest(two)
        second("serve", "tcp", "0.0.0.0", 80, "two")
        assert await call(first, "ask", "tcp", address(two), 80) == f"two {address(one)}"
        assert await call(first, "refused", "tcp", FIRST, 80)


async def test_a_published_port_answers_whatever_the_policy(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        row = vm(1, "bridge", "0.0.0.0:8080:80", egress="none")
        guest = await start(made, row)
        guest("serve", "tcp", "0.0.0.0", 80, "guest")
        assert await call(world.world, "ask", "tcp", UPLINK, 8080) == f"guest {WORLD}"


async def test_denied_connections_and_names_are_counted_and_shown(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, made):
        row = restricted(1, "allowed.example")
        guest = await start(made, row)
        for _ in range(3):
            await call(guest, "refused", "tcp", SECOND, 80)
        await call(guest, "refused", "udp", THIRD, 443)
        await call(guest, "resolve", "other.example", GATEWAY)
        found: Any = await made.activity.describe(row)
        assert found["problem"] is None
        assert found["denied_connections"] == 4
        assert {(each["address"], each["port"], each["protocol"]) for each in found["denied_destinations"]} == {
            (THIRD, 443, "udp"),
            (SECOND, 80, "tcp"),
        }
        ((name, count),) = [(each["name"], each["count"]) for each in found["denied_names"]]
        assert (name, count) == ("other.example", 1)
        assert await made.activity.denied_connections() == {1: 4}


async def test_a_new_daemon_keeps_what_was_allowed_and_counted(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        row = restricted(1, "allowed.example", "*.wild.example")
        guest = await start(made, row)
        await call(guest, "resolve", "allowed.example", GATEWAY)
        await call(guest, "refused", "tcp", SECOND, 80)
        before = egress_rules()
        # The first one is gone without a word.
        async with egress(world, tmp_path) as second:
            assert egress_rules() == before, "until the new one has its own rules, those of the old one hold"
            await having(second.networks, row)
            assert await call(guest, "ask", "tcp", FIRST, 80) == f"tcp {FIRST} {UPLINK}"
            assert await call(guest, "refused", "tcp", SECOND, 80)
            assert await second.activity.denied_connections() == {1: 2}
            made.resolvers.close(1)
            assert await call(guest, "resolve", "www.wild.example", GATEWAY) == [FIRST]


async def test_rules_that_something_removes_are_put_back_with_the_addresses(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        row = restricted(1, "allowed.example")
        world.rows = [row]
        async with keeper(made.networks) as network:
            await network.ask(Attach(1), timeout_s=60)
            guest = world.guest(row)
            await call(guest, "resolve", "allowed.example", GATEWAY)
            nft("flush ruleset")
            with trio.fail_after(_S):
                while "names-1-0" not in ruleset() or "source-nat" not in ruleset():  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.05)
            assert await call(guest, "ask", "tcp", FIRST, 80) == f"tcp {FIRST} {UPLINK}"
            assert await call(guest, "refused", "tcp", SECOND, 80)
            world.rows = [stopped(row)]
        assert "names-1-0" in ruleset(), "something has its tap open, so it may send"


@pytest.mark.parametrize("loss", ["forgotten", "changed"])
async def test_a_table_that_is_replaced_goes_on_counting(tmp_path: Path, loss: str) -> None:
    async with served(tmp_path) as (world, made):
        row, other = world.rows = [restricted(1, "none"), restricted(2, "none")]
        await having(made.networks, row, other)
        await call(world.guest(row), "refused", "tcp", SECOND, 80)
        if loss == "forgotten":
            made.networks.forget()
        else:
            # So the next change is refused, and the whole table is replaced.
            nft(f"delete element {SETTINGS.egress_table} policies {{ {address(other)} }}")
            world.rows = [row, stopped(other)]
        assert await made.networks.ensure({other.id}) == {}
        assert (await made.activity.denied_connections())[row.id] == 1


async def test_a_guest_sends_nothing_while_its_rules_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as (world, made):
        backend = made.networks._backend
        load = backend.load

        async def refuse(rules: str) -> None:
            if SETTINGS.egress_table in rules:
                raise NetworkFailed("firewall", "no")
            await load(rules)

        monkeypatch.setattr(backend, "load", refuse)
        closed, open_ = world.rows = [restricted(1, "none"), vm(2)]
        failures = await made.networks.ensure({1, 2})
        assert [*failures] == [1]
        guest, other = world.guest(closed), world.guest(open_)
        assert not await call(guest, "ping", GATEWAY, 0.5)
        assert await call(guest, "refused", "tcp", FIRST, 80)
        assert await call(other, "ask", "tcp", FIRST, 80) == f"tcp {FIRST} {UPLINK}"
        monkeypatch.undo()
        assert await made.networks.ensure({1}) == {}
        assert await call(guest, "ping", GATEWAY)
        assert await call(guest, "refused", "tcp", FIRST, 80)


@pytest.mark.parametrize("forgotten", [False, True])
async def test_the_rules_of_a_vm_that_is_killed_hold_as_long_as_the_bridge_lets_it_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    async with served(tmp_path) as (world, made):
        assert await made.networks.passt_filter.obstacle() is None
        row, other = restricted(1, "none"), behind_passt(2, "none")
        guest = await start(made, row)
        world.rows = [stopped(row), other]
        if forgotten:
            made.networks.forget()
        # Whatever changes the egress rules before the VM is detached.
        await made.networks.confine(other.id)
        assert await call(guest, "refused", "tcp", FIRST, 80)

        backend = made.networks._backend
        load = backend.load

        async def refuse(rules: str) -> None:
            if f"bridge {SETTINGS.table}" in rules:
                raise NetworkFailed("firewall", "no")
            await load(rules)

        monkeypatch.setattr(backend, "load", refuse)
        with pytest.raises(NetworkFailed):
            await made.networks.ensure({row.id})
        assert await call(guest, "refused", "tcp", FIRST, 80)
        monkeypatch.undo()
        assert await made.networks.ensure({row.id}) == {}
        assert "vm-1" not in egress_rules()
        assert "vm-2" in egress_rules()


async def test_the_next_vm_with_the_address_has_its_own_rules(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        first = restricted(1, "allowed.example")
        guest = await start(made, first)
        await call(guest, "resolve", "allowed.example", GATEWAY)
        world.rows = [stopped(first)]
        await made.networks.ensure({1})
        assert "names-1-0" not in ruleset()
        second = restricted(2, "none")
        assert second.lease is not None
        second = msgspec.structs.replace(second, lease=msgspec.structs.replace(second.lease, address=address(first)))
        other = await start(made, second)
        assert await call(other, "refused", "tcp", FIRST, 80)


async def test_hostile_answers_harm_nobody_else(tmp_path: Path) -> None:
    deeds = ["garbage", "compression loop", "self-pointer", "wrong id", "other name", "huge", "refuses", "silent"]
    async with served(tmp_path) as (world, made):
        entries = {f"{deed.replace(' ', '-')}.wild.example": {"a": [THIRD], "does": deed} for deed in deeds}
        entries["first.wild.example"] = {"a": [FIRST], "does": "wrong id first"}
        entries["long.wild.example"] = {"a": [FIRST], "does": "truncated"}
        entries["stops.wild.example"] = {"cname": "edge.example", "does": "stop"}
        entries["loop.wild.example"] = {"cname": "loop.wild.example", "does": "stop"}
        world.world("dns_zone", entries)
        one, two = world.rows = [restricted(1, "*.wild.example"), restricted(2, "allowed.example")]
        await having(made.networks, one, two)
        guest, other = world.guest(one), world.guest(two)
        for deed in deeds:
            assert await call(guest, "resolve", f"{deed.replace(' ', '-')}.wild.example", GATEWAY) == ["SERVFAIL"], deed
        assert await call(guest, "resolve", "loop.wild.example", GATEWAY) == ["SERVFAIL"]
        for name in ("first", "long", "stops"):
            assert await call(guest, "resolve", f"{name}.wild.example", GATEWAY) == [FIRST], name
        assert await call(guest, "refused", "tcp", THIRD, 80)
        assert await call(other, "resolve", "allowed.example", GATEWAY) == [FIRST]


async def test_a_flood_of_queries_delays_no_other_vm(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        one, two = world.rows = [restricted(1, "*.allowed.example"), restricted(2, "allowed.example")]
        await having(made.networks, one, two)
        guest, other = world.guest(one), world.guest(two)

        async def forwarded() -> int:
            """Returns how many queries of the flood the DNS server of the world has received so far."""
            asked = await call(world.world, "dns_zone", {})
            return len([name for name in asked if name != "allowed.example"])

        flooded: list[int] = []

        async def flood() -> None:
            flooded.append(await call(guest, "flood", GATEWAY, 5.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            with trio.fail_after(_S):
                while await forwarded() == 0:  # noqa: ASYNC110 - another process's list
                    await trio.sleep(0.05)
            assert await call(other, "resolve", "allowed.example", GATEWAY) == [FIRST]
            assert await call(other, "ask", "tcp", FIRST, 80) == f"tcp {FIRST} {UPLINK}"
            assert flooded == [], "the flood has ended before the other VM was served"
        assert flooded[0] > 1000
        assert 0 < await forwarded() < 600
        assert len(made.resolvers.denied_names(1)) <= 32


async def test_a_passt_reaches_what_the_rules_of_its_vm_allow(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        assert await made.networks.passt_filter.obstacle() is None
        one, two = world.rows = [behind_passt(1, "allowed.example:443", f"{SECOND}:80"), behind_passt(2, "none")]
        async with keeper(made.networks) as network:
            for row in world.rows:
                await network.ask(Confine(row.id), timeout_s=60)
            user, none = made.passt.user_of(one), made.passt.user_of(two)
            assert user is not None
            assert none is not None
            assert user != none
            assert await reached(user, (FIRST, 443), (SECOND, 80), (SECOND, 443), (UPLINK, 80)) == [(SECOND, 80)]
            assert await names(user, "other.example") == "NXDOMAIN"
            assert await names(user, "allowed.example") == FIRST
            assert await reached(user, (FIRST, 443), (FIRST, 80)) == [(FIRST, 443)]
            assert await reached(none, (FIRST, 443), (SECOND, 80)) == []
            assert await names(none, "allowed.example") == "NXDOMAIN"
            # Other users of the host are not restricted, and can't use the resolvers.
            assert await reached(user_of_images(VM_USERS), (FIRST, 80)) == [(FIRST, 80)]
            world.rows = [stopped(one), stopped(two)]
        assert ruleset() == ""


async def test_a_vm_keeps_the_user_of_its_passt_until_that_has_ended(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        networks = made.networks
        assert await networks.passt_filter.obstacle() is None
        older = behind_passt(1, f"{FIRST}:80")
        newer = msgspec.structs.replace(behind_passt(2, f"{SECOND}:80"), id=older.id + len(made.passt.users))
        user = made.passt.user_of(older)
        assert user is not None
        assert user == made.passt.user_of(newer)
        world.rows = [newer]
        await networks.confine(newer.id)
        world.rows = [older, newer]
        for forgotten in (False, True):
            if forgotten:
                networks.forget()
            with pytest.raises(NetworkFailed, match="no user"):
                await networks.confine(older.id)
            assert await reached(user, (FIRST, 80), (SECOND, 80)) == [(SECOND, 80)]
        world.rows = [older, stopped(newer)]
        with pytest.raises(NetworkFailed, match="no user"):
            await networks.confine(older.id)
        assert await reached(user, (FIRST, 80), (SECOND, 80)) == [(SECOND, 80)]
        await networks.release(newer.id)
        await networks.confine(older.id)
        assert await reached(user, (FIRST, 80), (SECOND, 80)) == [(FIRST, 80)]


async def test_a_failure_to_list_is_not_taken_for_a_missing_object() -> None:
    backend = HostNetwork(Host())
    nft("table inet there {\n chain c { }\n}\n")
    assert len(await backend.listed("table inet there")) == 3
    for what in ("table inet gone", "set inet there gone", "counters table inet gone"):
        assert await backend.listed(what) == ()
    with pytest.raises(NetworkFailed, match="nft can't list table inet: "):
        await backend.listed("table inet")


_NAME = """
import socket, sys
labels = b"".join(bytes([len(label)]) + label.encode() for label in sys.argv[1].split("."))
query = bytes.fromhex("4242 0100 0001 0000 0000 0000") + labels + bytes.fromhex("00 0001 0001")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(15)
    sock.connect(("10.0.2.2", 53))
    sock.send(query)
    reply = sock.recv(1000)
print("NXDOMAIN" if reply[3] & 15 == 3 else ".".join(map(str, reply[-4:])), end="")
"""


def egress_rules() -> str:
    return ruleset().partition(f"table {SETTINGS.egress_table}")[2].partition("\n}\n")[0]


async def reached(user: int, *targets: tuple[str, int]) -> list[tuple[object, object]]:
    """Returns the address and port of each TCP server that answers a user of the host, while this process answers DNS
    queries."""
    found = await trio.to_thread.run_sync(lambda: answered(user, *targets, protocols=["tcp"], timeout_s=3.0))
    return [(host, port) for host, port, _ in found]


async def names(user: int, name: str) -> str:
    return await trio.to_thread.run_sync(of_user, user, _NAME, name)


async def test_a_connection_of_the_host_from_the_port_of_a_resolver_gets_its_answers(tmp_path: Path) -> None:
    async with served(tmp_path) as (world, made):
        guest = await start(made, restricted(1, "allowed.example"))
        port = resolver_port(made)
        assert await trio.to_thread.run_sync(answer_from, UPLINK, port, (FIRST, 80)) == f"tcp {FIRST} {UPLINK}"
        # So does another service of the host that listens at the same port.
        with socket.create_server((UPLINK, port)) as server:
            assert await call(world.world, "connects", UPLINK, port)
            server.accept()[0].close()
        # The resolver itself can't be used directly, by the host or the guest.
        for protocol in ("udp", "tcp"):
            assert await trio.to_thread.run_sync(resolve_at, GATEWAY, port, protocol) == "none"
        assert not await call(guest, "connects", GATEWAY, port)
        assert await call(guest, "resolve", "allowed.example", GATEWAY) == [FIRST]


def resolver_port(made: Egress, vm_id: int = 1) -> int:
    loaded = made.networks.egress._loaded
    assert loaded is not None
    return loaded[vm_id][1]


def answer_from(local: str, port: int, to: tuple[str, int]) -> str:
    """Returns what a server sends to a connection with this local address and port."""
    with socket.socket() as sock:
        sock.settimeout(5)
        # So that the port is free again at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((local, port))
            sock.connect(to)
            return sock.recv(1000).decode()
        except OSError as error:
            return str(error)


def resolve_at(server: str, port: int, protocol: str) -> str:
    query = dns.message.make_query("allowed.example", "A")
    asked = dns.query.udp if protocol == "udp" else dns.query.tcp
    try:
        return str(asked(query, server, timeout=1, port=port))
    except (OSError, dns.exception.DNSException):
        return "none"
