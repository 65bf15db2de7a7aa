"""Leases, names of taps and published ports, and the errors for them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, strategies as st

from volant.model import (
    CreateNetwork,
    CreateVm,
    Key,
    Lease,
    Manifest,
    NetworkChoice,
    Networking,
    Problem,
    PublishedPort,
    allocate,
    check_ports_free,
    default_network,
    moved,
    new_network,
    new_row,
    parse_subnet,
    tap_of,
    tap_prefix,
)
from volant.model._network import MAX_PORTS, capacity_of, mac_of, parse_port, parse_ports

from .kit import NOW

ONE, OTHER = "0123456789", "fedcba9876"
instances = st.from_regex(r"[0-9a-f]{10}", fullmatch=True)
ids = st.integers(1, 2**40)


def lease(subnet: str, *taken: str, vm_id: int = 1) -> Lease:
    return allocate(IPv4Network(subnet), set(taken), instance=ONE, vm_id=vm_id)


def test_the_lowest_free_address_is_leased() -> None:
    assert lease("192.168.127.0/24").address == "192.168.127.2"
    assert lease("192.168.127.0/24", "192.168.127.2", "192.168.127.4").address == "192.168.127.3"
    given = lease("10.1.0.0/16")
    assert (given.prefix, given.gateway) == (16, "10.1.0.1")


@given(
    prefix=st.integers(26, 30),
    network=st.integers(0, 2**24 - 1),
    order=st.lists(st.booleans(), max_size=150),
    data=st.data(),
)
def test_addresses_are_unique_and_a_full_subnet_is_an_error(
    prefix: int, network: int, order: list[bool], data: st.DataObject
) -> None:
    subnet = IPv4Network((int(IPv4Address("10.0.0.0")) + network, prefix), strict=False)
    out: dict[str, int] = {}
    for vm_id, comes in enumerate(order, 1):
        if not comes:
            if out:
                del out[data.draw(st.sampled_from(sorted(out)))]
            continue
        if len(out) == capacity_of(subnet):
            with pytest.raises(Problem) as full:
                allocate(subnet, out.keys(), instance=ONE, vm_id=vm_id)
            assert (full.value.status, full.value.code) == (503, "subnet-full")
            assert f"all {capacity_of(subnet)} addresses of the subnet {subnet}" in full.value.detail
            continue
        given = allocate(subnet, out.keys(), instance=ONE, vm_id=vm_id)
        assert given.address not in out
        assert IPv4Address(given.address) in set(subnet.hosts()) - {IPv4Address(given.gateway)}
        out[given.address] = vm_id


@given(instance=instances, vm_id=ids)
def test_the_name_of_a_tap_fits_and_names_its_daemon(instance: str, vm_id: int) -> None:
    name = tap_of(instance, vm_id)
    assert len(name) == 15
    assert name.isalnum()
    assert name.isascii()
    assert name.startswith(tap_prefix(instance))


@given(first=instances, second=instances, one=st.integers(1, 36**6), another=st.integers(1, 36**6))
def test_names_of_taps_are_unique(first: str, second: str, one: int, another: int) -> None:
    assert (tap_of(first, one) == tap_of(second, another)) == ((first, one % 36**6) == (second, another % 36**6))


@given(instance=instances, one=st.integers(1, 2**24), apart=st.integers(1, 2**24 - 1))
def test_a_mac_is_local_unicast_and_of_one_vm(instance: str, one: int, apart: int) -> None:
    octets = bytes.fromhex(mac_of(instance, one).replace(":", ""))
    assert (len(octets), octets[0]) == (6, 0x02)
    assert mac_of(instance, one) != mac_of(instance, one + apart)


def test_a_lease_that_moves_to_another_daemon_keeps_only_its_address() -> None:
    before = lease("10.0.0.0/24", vm_id=7)
    after = moved(before, OTHER, 7)
    assert (after.address, after.gateway) == (before.address, before.gateway)
    assert (after.tap, after.mac) == (tap_of(OTHER, 7), mac_of(OTHER, 7))
    assert moved(before, ONE, 7) == before


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8080:80", PublishedPort(host="127.0.0.1", host_port=8080, guest_port=80)),
        ("0.0.0.0:53:5353/udp", PublishedPort(host="0.0.0.0", host_port=53, guest_port=5353, protocol="udp")),
        ("10.0.0.7:65535:1/tcp", PublishedPort(host="10.0.0.7", host_port=65535, guest_port=1)),
    ],
)
def test_the_text_of_a_port_can_be_parsed_again(text: str, port: PublishedPort) -> None:
    assert parse_port(text) == port
    assert parse_port(str(port)) == port


@pytest.mark.parametrize(
    "text",
    ["", "80", "0:80", "80:0", "65536:80", "80:65536", "80:80/sctp", "localhost:80:80", "1.2.3:80:80",
     "256.1.1.1:80:80", "224.0.0.1:80:80", "::1:80:80", "[::1]:80:80", " 80:80", "80:80\n", "-1:80",
     "٨٠:80", "1:2:3:4"],
)  # fmt: skip
def test_a_malformed_port_is_a_400_that_shows_it(text: str) -> None:
    with pytest.raises(Problem) as refused:
        parse_port(text)
    assert (refused.value.status, refused.value.field) == (400, "ports")
    assert repr(text) in refused.value.detail


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("8080:80", "8080:81", True),
        ("8080:80", "0.0.0.0:8080:80", True),
        ("8080:80", "10.0.0.1:8080:80", False),
        ("8080:80", "8080:80/udp", False),
        ("8080:80", "8081:80", False),
    ],
)
def test_a_port_of_the_host_leads_to_one_guest(one: str, other: str, meet: bool) -> None:
    first, second = parse_port(one), parse_port(other)
    assert first.conflicts(second) == second.conflicts(first) == meet
    if meet:
        with pytest.raises(Problem, match="can't have both"):
            parse_ports([one, other])
        with pytest.raises(Problem) as taken:
            check_ports_free("own", [first], [(Key("own", "web"), second)])
        assert (taken.value.status, taken.value.code) == (409, "port-taken")
        assert "'web'" in taken.value.detail
        with pytest.raises(Problem) as foreign:
            check_ports_free("own", [first], [(Key("other", "web"), second)])
        assert "web" not in foreign.value.detail
    else:
        assert parse_ports([one, other]) == (first, second)
        check_ports_free("own", [first], [(Key("own", "web"), second)])


def test_a_vm_publishes_a_bounded_number_of_ports() -> None:
    parse_ports([f"{8000 + number}:80" for number in range(MAX_PORTS)])
    with pytest.raises(Problem, match=f"at most {MAX_PORTS}"):
        parse_ports([f"{8000 + number}:80" for number in range(MAX_PORTS + 1)])


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1/24", "10.0.0.0/31", "10.0.0.0/7", "10.0.0.0/33", "fd00::/64", "8.8.8.0/24", "127.0.0.0/24",
             "169.254.0.0/16", "224.0.0.0/24", "blue"],
)  # fmt: skip
def test_an_unsuitable_subnet_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"subnet"):
        parse_subnet(text)


def test_a_subnet_of_thirty_bits_carries_one_guest() -> None:
    subnet = parse_subnet("10.0.0.0/30")
    assert capacity_of(subnet) == 1
    assert allocate(subnet, set(), instance=ONE, vm_id=1).address == "10.0.0.2"


@pytest.mark.parametrize("name", ["none", "bridge", "user"])
def test_a_network_can_not_have_the_name_of_a_kind(name: str) -> None:
    with pytest.raises(Problem, match="kind of network"):
        new_network(CreateNetwork(name=name), now=NOW)


def test_a_row_has_its_network_and_the_reason() -> None:
    def made(**fields: object) -> tuple[str, str]:
        request = CreateVm(name="demo", cpu_cores=1, memory_mb=128, **fields)  # type: ignore[arg-type] # by the test
        networking = Networking(default=NetworkChoice("bridge", "the daemon's setting `network`"))
        shown = new_row(request, Manifest(name="base"), vm_id=1, now=NOW, networking=networking).view
        return shown.network, shown.network_reason

    assert made() == ("bridge", "the daemon's setting `network`")
    assert made(network="none") == ("none", "asked for when it was created")


@pytest.mark.parametrize(
    ("setting", "obstacles", "found"),
    [
        ("auto", {}, ("bridge", "the daemon can set up a bridge")),
        ("auto", {"bridge": "it needs root"}, ("user", "no bridge: it needs root")),
        (
            "auto",
            {"bridge": "it needs root", "user": "there is no passt"},
            ("none", "no bridge: it needs root; no network of a user: there is no passt"),
        ),
        ("none", {}, ("none", "the daemon's setting `network`")),
        ("bridge", {"bridge": "it needs root"}, ("bridge", "the daemon's setting `network`")),
    ],
)
def test_the_default_network_is_the_best_of_the_host(
    setting: str, obstacles: dict[str, str], found: tuple[str, str]
) -> None:
    assert default_network(setting, obstacles)[:2] == found


def test_only_a_root_daemon_warns_of_a_network_without_a_bridge() -> None:
    obstacles = {"bridge": "another daemon has the subnet"}
    assert default_network("auto", obstacles, is_root=True).fallback
    assert not default_network("auto", obstacles).fallback
    assert not default_network("auto", {}, is_root=True).fallback
    assert not default_network("user", obstacles, is_root=True).fallback


def test_ports_of_a_vm_without_a_network_are_refused() -> None:
    request = CreateVm(name="demo", cpu_cores=1, memory_mb=128, ports=("8080:80",))
    with pytest.raises(Problem) as refused:
        new_row(request, Manifest(name="base"), vm_id=1, now=NOW)
    assert (refused.value.status, refused.value.field) == (422, "ports")
    assert "setting `network`" in refused.value.detail
