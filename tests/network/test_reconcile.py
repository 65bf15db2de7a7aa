"""The host becomes what the rows say, whatever state it was left in, and foreign links and rules stay."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import IPv4Network
from typing import Any

import pytest
import trio
from pyroute2 import IPRoute

from actors import Ref
from tests.network import peer
from tests.network.kit import (
    SETTINGS,
    SUBNET,
    UPLINK,
    WORLD,
    World,
    a_world,
    address,
    having,
    keeper,
    links,
    nft,
    ruleset,
    stopped,
    vm,
    with_vm,
)
from volant.host import Host, make_permanent, open_or_create_tap
from volant.host._sockets import LinuxSockets
from volant.hypervisor.qemu import _netdev
from volant.model import VmRow
from volant.network import HostNetwork, NetworkFailed, Networks, NetworkSettings
from volant.network.messages import Attach, Detach, Reconcile

pytestmark = pytest.mark.usefixtures("namespace")

ROUNDS = 500 if os.environ.get("VOLANT_TEST_FULL") else 60
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_CLONE_NEWNS = 0x20000
_PR_CAPBSET_DROP, _CAP_NET_ADMIN = 24, 12


def state() -> tuple[object, ...]:
    """Returns links, addresses and firewall of this host."""
    with IPRoute() as ipr:
        names = {link["index"]: link.get("ifname") for link in ipr.get_links()}
        there = sorted(
            (
                link.get("ifname"),
                link.get("linkinfo").get("kind") if link.get("linkinfo") else "",
                names.get(link.get("master")),
                bool(link["flags"] & 1),
            )
            for link in ipr.get_links()
        )
        addresses = sorted(
            (names[message["index"]], message.get("address"), message["prefixlen"])
            for message in ipr.get_addr(family=socket.AF_INET)
        )
        return there, addresses, ruleset()


def tap(row: VmRow) -> str:
    assert row.lease is not None
    return row.lease.tap


def delete(*names: str) -> None:
    with IPRoute() as ipr:
        for name in names:
            ipr.link("del", ifname=name)


async def as_it_should_be(world: World) -> tuple[object, ...]:
    """Returns the state after a reconciliation on an empty host."""
    await world.networks().reconcile()
    return state()


ROWS = [vm(1), vm(2, "blue", "127.0.0.1:8080:80"), vm(3, "blue")]


def nothing_left() -> None:
    delete(*(name for name in links() if name.startswith("v")))
    nft("flush ruleset")


def bridge_gone() -> None:
    delete(SETTINGS.bridge_name)


def bridge_down_and_without_its_address() -> None:
    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname=SETTINGS.bridge_name)
        ipr.link("set", index=index, state="down")
        ipr.flush_addr(index=index)
        ipr.addr("add", index=index, address="10.99.0.1", prefixlen=24)


def a_tap_gone_and_one_elsewhere() -> None:
    delete(tap(ROWS[0]))
    with IPRoute() as ipr:
        ipr.link("set", index=ipr.link_lookup(ifname=tap(ROWS[1]))[0], master=0, state="down")


def firewall_gone() -> None:
    nft("flush ruleset")


def firewall_half_gone() -> None:
    nft(
        f"delete table inet {SETTINGS.table}\n"
        f"flush chain bridge {SETTINGS.table} forward\n"
        f"flush set bridge {SETTINGS.table} guests\n"
        f'add element bridge {SETTINGS.table} nics {{ "vstale" . 02:00:00:00:00:01 }}\n'
    )


def a_tap_of_nobody() -> None:
    with IPRoute() as ipr:
        ipr.link("add", ifname=tap(vm(9)), kind="tuntap", mode="tap")


@pytest.mark.parametrize(
    "damage",
    [
        nothing_left,
        bridge_gone,
        bridge_down_and_without_its_address,
        a_tap_gone_and_one_elsewhere,
        firewall_gone,
        firewall_half_gone,
        a_tap_of_nobody,
    ],
)
async def test_every_damage_is_repaired(damage: object) -> None:
    assert callable(damage)
    with a_world() as world:
        world.rows = ROWS
        wanted = await as_it_should_be(world)
        damage()
        assert state() != wanted

        assert await world.networks().reconcile() == {}

        assert state() == wanted


async def test_a_starting_vm_has_its_network_right_after_a_damage() -> None:
    with a_world() as world:
        networks = world.networks()
        world.rows = ROWS
        await having(networks, *ROWS)
        nothing_left()

        world.rows = [*ROWS, vm(4)]
        await having(networks, world.rows[-1])
        guest = world.guest(world.rows[-1])
        world.world("serve", "tcp", WORLD, 80, "web")

        assert guest("ask", "tcp", WORLD, 80) == f"web {UPLINK}"


class Seen(Networks):
    """Sets an event after each complete reconciliation."""

    def __init__(self, world: World) -> None:
        super().__init__(HostNetwork(Host()), SETTINGS, lambda: world.rows)
        self.looked = trio.Event()

    async def reconcile(self) -> Mapping[int, NetworkFailed]:
        failures = await super().reconcile()
        self.looked.set()
        return failures


@pytest.mark.parametrize("damage", [firewall_gone, bridge_gone])
async def test_a_removed_bridge_or_firewall_is_restored_at_once(damage: object) -> None:
    assert callable(damage)
    with a_world() as world:
        world.rows = ROWS
        networks = Seen(world)
        async with keeper(networks) as network:
            await network.ask(Reconcile(), timeout_s=60)
            wanted = state()
            networks.looked = trio.Event()
            damage()
            with trio.fail_after(20):
                await networks.looked.wait()

            assert state() == wanted


async def test_the_daemons_own_changes_do_not_count_as_damage() -> None:
    with a_world() as world:
        world.rows = ROWS
        networks = Seen(world)
        async with keeper(networks) as network:
            for _ in range(3):
                await network.ask(Reconcile(), timeout_s=60)
            for times in (1, 2):
                networks.looked = trio.Event()
                # Earlier reports of the kernel arrive before this one.
                firewall_gone()
                with trio.fail_after(20):
                    await networks.looked.wait()

                assert network.inspect()["actor"]["batches"] == 1 + 3 + times


async def test_foreign_interfaces_and_rules_are_never_changed() -> None:
    with a_world() as world:
        with IPRoute() as ipr:
            ipr.link("add", ifname="br0", kind="bridge")
            ipr.link("add", ifname="tap0", kind="tuntap", mode="tap")
            ipr.link("set", index=ipr.link_lookup(ifname="tap0")[0], master=ipr.link_lookup(ifname="br0")[0])
            ipr.addr("add", index=ipr.link_lookup(ifname="br0")[0], address="172.17.0.1", prefixlen=16)
        nft("table inet mine { chain c { type filter hook forward priority 0; policy accept; counter accept; }; }")
        before = state()
        networks = world.networks()

        world.rows = ROWS
        await having(networks, *ROWS)
        await networks.reconcile()
        world.rows = []
        await networks.remove()

        assert state() == before


async def test_creating_and_deleting_vms_leaves_the_host_unchanged() -> None:
    with a_world() as world:
        networks = world.networks()
        world.rows = [vm(1), vm(2, "blue")]
        await having(networks, *world.rows)
        before = state()

        for number in range(ROUNDS):
            row = vm(3 + number % 7, ["bridge", "blue", "green"][number % 3], f"127.0.0.1:{8000 + number % 5}:80")
            world.rows = [vm(1), vm(2, "blue"), row]
            await having(networks, row)
            assert tap(row) in links()
            world.rows[-1] = stopped(row)
            await having(networks, row)

        assert state() == before


async def test_all_vms_of_a_subnet_attach_and_detach_at_once() -> None:
    with a_world() as world:
        async with keeper(world.networks()) as network:
            before = links()
            world.rows = [vm(number) for number in range(1, 254)]
            await _ask_all(network, [Attach(row.id) for row in world.rows])
            assert links() - before == {SETTINGS.bridge_name, *map(tap, world.rows)}

            world.rows, gone = [], world.rows
            await _ask_all(network, [Detach(row.id) for row in gone])
            assert links() - before == {SETTINGS.bridge_name}


async def _ask_all(network: Ref[Any], messages: Sequence[Attach | Detach]) -> None:
    async with trio.open_nursery() as nursery:
        for message in messages:
            nursery.start_soon(partial(network.ask, message, timeout_s=60))


async def test_two_daemons_on_one_host_do_not_conflict() -> None:
    other = NetworkSettings(instance="abcdef0123", subnet=IPv4Network("10.88.0.0/24"))
    with a_world() as world:
        mine, theirs = world.networks(), Networks(HostNetwork(Host()), other, lambda: rows)
        world.rows = [vm(1, "blue", "127.0.0.1:8080:80")]
        rows = [vm(1, "blue", "127.0.0.1:8081:80", instance=other.instance, subnet=other.subnet)]
        await having(mine, *world.rows)
        alone = state()
        await having(theirs, *rows)
        one, two = world.guest(world.rows[0]), world.guest(rows[0])
        for guest, name in ((one, "mine"), (two, "theirs")):
            guest("serve", "tcp", "0.0.0.0", 80, name)
        world.world("serve", "tcp", WORLD, 80, "web")

        assert peer.ask("tcp", "127.0.0.1", 8080) == "mine 10.87.0.1"
        assert peer.ask("tcp", "127.0.0.1", 8081) == "theirs 10.88.0.1"
        assert two("ask", "tcp", WORLD, 80) == f"web {UPLINK}"
        assert one("refused", "tcp", address(rows[0]), 80)
        assert two("refused", "tcp", address(world.rows[0]), 80)
        await mine.reconcile()
        assert two("ask", "tcp", WORLD, 80) == f"web {UPLINK}"

        rows.clear()
        await theirs.remove()
        assert state() == alone


async def test_checking_the_kernel_changes_nothing() -> None:
    with a_world() as world:
        before = state()

        assert await world.networks().obstacle() is None
        await HostNetwork(Host()).check("add table bridge volant-tried")
        with pytest.raises(NetworkFailed, match="no-such-family"):
            await HostNetwork(Host()).check("add table no-such-family volant-tried")

        assert state() == before


async def test_a_subnet_in_use_is_an_error_and_nothing_is_created() -> None:
    with a_world() as world:
        there = world.machine("lan0", "10.87.0.9/16", "10.87.0.10/16")
        before = state()
        world.rows = [vm(1)]
        networks = world.networks()

        assert "10.87.0.0/16 dev lan0" in (await networks.obstacle() or "")
        with pytest.raises(NetworkFailed, match=r"10\.87\.0\.0/16 dev lan0.*VOLANT_SUBNET"):
            await networks.ensure({1})

        assert state() == before
        there("serve", "tcp", "0.0.0.0", 80, "lan")
        assert peer.ask("tcp", "10.87.0.10", 80) == "lan 10.87.0.9"


async def test_the_subnet_of_another_daemon_counts_as_in_use() -> None:
    other = NetworkSettings(instance="abcdef0123", subnet=SUBNET)
    with a_world() as world:
        world.rows = [vm(1)]
        await having(world.networks(), *world.rows)

        second = Networks(HostNetwork(Host()), other, lambda: [])

        assert f"10.87.0.0/24 dev {SETTINGS.bridge_name}" in (await second.obstacle() or "")
        assert await world.networks().obstacle() is None


async def test_a_renamed_bridge_keeps_its_vms() -> None:
    with a_world() as world:
        _, guest = await with_vm(world)
        world.world("serve", "tcp", WORLD, 80, "web")

        renamed = NetworkSettings(instance=SETTINGS.instance, subnet=SUBNET, bridge="br7")
        await world.networks(renamed).reconcile()

        assert SETTINGS.bridge_name not in links()
        assert guest("ask", "tcp", WORLD, 80) == f"web {UPLINK}"


async def test_without_forwarding_the_error_names_the_sysctl() -> None:
    with a_world() as world:
        world.rows = [vm(1)]
        _make_switches_read_only()

        assert "sysctl -w net.ipv4.ip_forward=1" in str(await world.networks().obstacle())
        with pytest.raises(NetworkFailed, match=r"ip_forward=1.*/etc/sysctl\.d") as caught:
            await world.networks().ensure({1})

        assert caught.value.code == "forwarding"


async def test_a_host_that_forwards_needs_no_switch() -> None:
    with a_world(forwarding=True) as world:
        _make_switches_read_only()
        assert await world.networks().obstacle() is None


def _make_switches_read_only() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = b"/proc/sys"
    assert libc.unshare(_CLONE_NEWNS) == 0
    assert libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    assert libc.mount(path, path, None, _MS_BIND, None) == 0
    assert libc.mount(path, path, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, None) == 0


async def test_another_user_cannot_open_a_tap() -> None:
    with a_world() as world:
        world.rows = [vm(1)]
        await having(world.networks(), *world.rows)

        assert _opens(0, tap(world.rows[0]))
        assert not _opens(54321, tap(world.rows[0]))


def _opens(user: int, name: str) -> bool:
    """Returns whether a process of this user can open the tap, if it can open /dev/net/tun."""
    code = f"""
import fcntl, os, struct
fd = os.open("/dev/net/tun", os.O_RDWR)
os.setuid({user})
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"{name}", 0x1002))
"""
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def _give_up_net_admin() -> None:
    """Drops the capability for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_CAPBSET_DROP, _CAP_NET_ADMIN, 0, 0, 0) == 0
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for index in range(3):
        sets[index] &= ~(1 << _CAP_NET_ADMIN)
    assert libc.capset(header, sets) == 0


async def test_without_cap_net_admin_the_error_names_it() -> None:
    with a_world() as world:
        world.rows = [vm(1)]
        _give_up_net_admin()

        assert "CAP_NET_ADMIN" in (await world.networks().obstacle() or "")
        with pytest.raises(NetworkFailed, match="CAP_NET_ADMIN"):
            await world.networks().ensure({1})


class Handing(LinuxSockets):
    """Lets go of a tap once somebody was refused it."""

    def __init__(self, tun: int) -> None:
        self._tun = tun
        self.refused = 0

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        with ExitStack() as stack:
            try:
                tap = stack.enter_context(super().open_tap(name))
            except OSError:
                self.refused += 1
                if self.refused == 2:
                    os.close(self._tun)
                raise
            yield tap


async def test_a_launch_waits_for_a_tap_that_is_being_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tun = open_or_create_tap("vtap0")
    make_permanent(tun, os.geteuid())
    host = Host()
    host.sockets = handing = Handing(tun)
    with ExitStack() as stack:
        await _netdev.open_tap(host, "vtap0", stack)
        assert handing.refused == 2
        monkeypatch.setattr(_netdev, "_TAP_S", 0.05)
        with ExitStack() as second, pytest.raises(OSError, match="busy"):
            await _netdev.open_tap(Host(), "vtap0", second)
