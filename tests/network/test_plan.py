"""The plan follows from the rows alone."""

from __future__ import annotations

from ipaddress import IPv4Network

import msgspec
import pytest

from tests.network.kit import INSTANCE, SETTINGS, SUBNET, stopped, user_vm, vm
from volant.model import Phase, Status, VmRow
from volant.network import Link, MakeBridge, MakeTap, NetworkFailed, NetworkSettings, RemoveLink, Route, SetLocalnet
from volant.network._plan import NetworkPlan, check_subnets, plan_of, steps_to

BRIDGE = Link(name=SETTINGS.bridge_name, kind="bridge", mac=SETTINGS.bridge_mac, up=True)


def plan(*rows: VmRow, settings: NetworkSettings = SETTINGS) -> NetworkPlan:
    return plan_of(settings, rows)


def tap(row: VmRow, **fields: object) -> Link:
    assert row.lease is not None
    return msgspec.structs.replace(
        Link(name=row.lease.tap, kind="tun", mac="", up=True, master=SETTINGS.bridge_name), **fields
    )


def test_a_vm_has_a_tap_from_the_commit_of_its_tag_until_its_process_ends() -> None:
    row = vm(1, phase=Phase.LAUNCH, status=Status.STARTING)
    replace = msgspec.structs.replace

    assert [tap.name for tap in plan(row).taps] == [row.lease.tap if row.lease else ""]
    assert plan(replace(row, phase=Phase.ASK)).taps
    assert not plan(replace(row, tag="", phase=Phase.IMAGE)).taps
    assert not plan(replace(row, phase=Phase.KILL)).taps
    assert not plan(replace(row, phase=Phase.REMOVE)).taps


def test_vms_with_the_networks_none_and_user_have_no_tap() -> None:
    none = msgspec.structs.replace(vm(1), lease=None, network="none")
    user = user_vm(2)

    assert plan(none, user).taps == ()
    assert [gateway.network for gateway in plan(none, user).gateways] == [SUBNET]


def test_names_contain_the_whole_instance_and_fit() -> None:
    other = NetworkSettings(instance="0123456788", subnet=SUBNET)

    assert SETTINGS.bridge_name != other.bridge_name
    assert SETTINGS.bridge_mac != other.bridge_mac
    assert SETTINGS.table != other.table
    assert len(SETTINGS.bridge_name) < 15
    assert NetworkSettings(instance=INSTANCE, subnet=SUBNET, bridge="br7").bridge_name == "br7"


def test_an_empty_host_gets_every_step_and_a_complete_host_none() -> None:
    rows = vm(1), vm(2, "blue", "127.0.0.1:8080:80")
    wanted = plan(*rows)
    bridge = MakeBridge(name=SETTINGS.bridge_name, mac=SETTINGS.bridge_mac, addresses=("10.87.0.1/24",))
    one, two = (MakeTap(name=tap(row).name, bridge=SETTINGS.bridge_name) for row in rows)
    localnet = SetLocalnet(bridge=SETTINGS.bridge_name, on=True)

    assert steps_to(wanted, []) == [bridge, one, two, localnet]
    assert steps_to(wanted, [BRIDGE, *map(tap, rows)]) == [bridge, localnet]
    assert steps_to(wanted, [BRIDGE, tap(rows[0], up=False), tap(rows[1], master="br9")]) == [
        bridge,
        one,
        two,
        localnet,
    ]


def test_stale_links_of_the_daemon_are_removed_and_others_kept() -> None:
    gone, found_again = vm(2), vm(3)
    ours = [
        tap(gone),
        msgspec.structs.replace(BRIDGE, name="renamed"),
    ]
    others = [
        tap(found_again, in_use=True),
        tap(vm(4, instance="0123456788")),
        # With the daemon's prefix, but not a tap, or not a name that it gives.
        tap(vm(5), kind="vlan"),
        tap(vm(6), name=f"{tap(vm(6)).name[:-1]}"),
        Link(name="br0", kind="bridge", mac="06:01:23:45:67:88", up=True),
        Link(name="eth0", kind="", mac="52:54:00:00:00:01", up=True),
    ]

    removed = [step.name for step in steps_to(plan(vm(1)), [*ours, *others]) if isinstance(step, RemoveLink)]

    assert removed == [link.name for link in ours]


def test_a_foreign_interface_with_the_bridges_name_is_an_error() -> None:
    for taken in (
        Link(name=SETTINGS.bridge_name, kind="bridge", mac="02:00:00:00:00:01", up=True),
        Link(name=SETTINGS.bridge_name, kind="", mac=SETTINGS.bridge_mac, up=True),
    ):
        with pytest.raises(NetworkFailed, match=f"{SETTINGS.bridge_name}.*VOLANT_BRIDGE") as caught:
            steps_to(plan(vm(1)), [taken])
        assert caught.value.code == "bridge_taken"


@pytest.mark.parametrize("destination", ["10.87.0.0/24", "10.87.0.128/25", "10.87.0.7/32", "10.0.0.0/8"])
def test_a_subnet_that_overlaps_with_a_route_is_an_error(destination: str) -> None:
    with pytest.raises(NetworkFailed, match=rf"10\.87\.0\.0/24.*{destination} dev wg0.*VOLANT_SUBNET") as caught:
        check_subnets(plan(), [Route(destination=destination, device="wg0")], [])
    assert caught.value.code == "subnet_in_use"


def test_default_routes_and_the_bridges_routes_do_not_overlap() -> None:
    check_subnets(
        plan(),
        [
            Route(destination="0.0.0.0/1", device="tun0"),
            Route(destination="10.86.0.0/24", device="eth0"),
            Route(destination="10.87.0.0/24", device=SETTINGS.bridge_name),
            # It was added later; an error would help no VM.
            Route(destination="10.87.0.0/16", device="wg0"),
        ],
        [BRIDGE],
    )


def test_vms_of_an_earlier_subnet_keep_their_gateway() -> None:
    before = vm(1, subnet=IPv4Network("192.168.9.0/24"))

    gateways = plan(before, vm(2)).gateways

    assert list(map(str, gateways)) == ["10.87.0.1/24", "192.168.9.1/24"]


@pytest.mark.parametrize(
    ("port", "on"), [("127.0.0.1:80:80", True), ("0.0.0.0:80:80", True), ("198.51.100.1:80:80", False)]
)
def test_route_localnet_is_on_only_for_ports_that_need_it(port: str, on: bool) -> None:
    row = vm(1, "bridge", port)

    assert plan(row).localnet is on
    assert plan(stopped(row)).localnet is False
