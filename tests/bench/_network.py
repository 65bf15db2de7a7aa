"""Measures a VM's network on the host: its lease, its tap and its rules.

The baseline are the bare calls: the same tap on a bridge with pyroute2, on a socket that stays open, and one run of
`nft` that adds its elements. The 200th VM of one daemon is measured in turns with the first of another one. All of it
happens in the network namespace of a separate process.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv4Network
from statistics import median

import trio

from tests.system.kit import REPOSITORY

from ._figure import Figure, Pairs
from ._world import Skipped

COUNT = 200
ROUNDS = 40
_CLONE_NEWNET = 0x40000000
_ASK_S = 60.0


async def network() -> list[Figure]:
    """The first VM, the 200th, and 200 at once. :raises Skipped: without root or nft"""
    check_bridge()
    done = await trio.run_process(
        [sys.executable, "-m", "tests.bench._network"], cwd=REPOSITORY, capture_stdout=True, check=True
    )
    told = json.loads(done.stdout)
    last, first = told["last"], told["first"]
    calls, by_hand, crowd = Pairs(last, told["netlink"]), Pairs(last, told["by_hand"]), Pairs(last, first)
    return [
        Figure("network_attach", calls.value, "ms", calls.ratio, "the bare netlink calls"),
        Figure("network_attach_and_nft", by_hand.value, "ms", by_hand.ratio, "those and a run of nft", at_most=2.0),
        Figure("network_200th", crowd.value, "ms", crowd.ratio, "the first", at_most=1.25),
        Figure("network_detach", median(told["detach"]), "ms"),
        Figure("network_at_once", told["at_once"] / COUNT, "ms", to=f"each of {COUNT} at once"),
    ]


def check_bridge() -> None:
    """Checks the requirements. :raises Skipped: if no network can be made here"""
    if os.geteuid() != 0:
        raise Skipped("a bridge needs root")
    if shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        raise Skipped("nft is not installed")


async def _measure() -> dict[str, object]:
    from pyroute2 import IPRoute

    from actors import ONE_FOR_ONE, Child, Supervisor, open_system
    from tests.network.kit import INSTANCE, SUBNET, nft, vm
    from volant.host import Host
    from volant.model import VmRow, allocate
    from volant.network import HostNetwork, NetworkKeeper, Networks, NetworkSettings
    from volant.network.messages import Attach, Detach

    class Side:
        """The networks of a daemon."""

        def __init__(self, name: str, instance: str, subnet: IPv4Network) -> None:
            self.instance, self.subnet = instance, subnet
            self.rows: list[VmRow] = []
            settings = NetworkSettings(instance=instance, subnet=subnet)
            networks = Networks(HostNetwork(Host()), settings, lambda: self.rows)
            self.child = Child(name, partial(NetworkKeeper, networks))

        def vm(self, vm_id: int) -> VmRow:
            port = f"127.0.0.1:{8000 + vm_id}:80"
            return vm(vm_id, "bridge", port, instance=self.instance, subnet=self.subnet)

        async def attach(self, row: VmRow) -> float:
            began = time.perf_counter()
            taken = {other.lease.address for other in self.rows if other.lease is not None}
            lease = allocate(self.subnet, taken, instance=self.instance, vm_id=row.id)
            self.rows.append(row)
            await self.child.ref.ask(Attach(row.id), timeout_s=_ASK_S)
            took = _ms(began)
            assert lease == row.lease
            return took

        async def detach(self, row: VmRow) -> float:
            self.rows.remove(row)
            began = time.perf_counter()
            await self.child.ref.ask(Detach(row.id), timeout_s=_ASK_S)
            return _ms(began)

        async def all(self, messages: list[Attach] | list[Detach]) -> float:
            began = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for message in messages:
                    nursery.start_soon(partial(self.child.ref.ask, message, timeout_s=_ASK_S))
            return _ms(began)

    crowd = Side("crowd", INSTANCE, SUBNET)
    lone = Side("lone", "abcdef0123", IPv4Network("10.88.0.0/24"))
    told: dict[str, list[float]] = {name: [] for name in ("first", "last", "detach", "netlink", "by_hand")}
    nft("table bridge bare { set guests { type ifname . ether_addr . ipv4_addr; }; }")
    with IPRoute() as ipr:
        ipr.link("add", ifname="bare", kind="bridge", br_stp_state=0, br_mcast_snooping=0)
        (bridge,) = ipr.link_lookup(ifname="bare")
        ipr.link("set", index=bridge, state="up")

        async def by_hand() -> None:
            began = time.perf_counter()
            ipr.link("add", ifname="bare1", kind="tuntap", mode="tap", uid=0)
            ipr.link("set", index=ipr.link_lookup(ifname="bare1")[0], master=bridge, state="up")
            told["netlink"].append(_ms(began))
            nft('add element bridge bare guests { "bare1" . 02:00:00:00:00:01 . 10.89.0.2 }')
            told["by_hand"].append(_ms(began))
            ipr.link("del", ifname="bare1")
            nft("flush set bridge bare guests")

        async def at_the(end: str, side: Side, vm_id: int) -> None:
            row = side.vm(vm_id)
            told[end].append(await side.attach(row))
            told["detach"].append(await side.detach(row))

        async with open_system(Supervisor(ONE_FOR_ONE, children=[crowd.child, lone.child])):
            # Create the bridge and the tables, and import, before the measurement.
            await at_the("first", crowd, 1)
            await at_the("first", lone, 1)
            crowd.rows = [crowd.vm(number) for number in range(1, COUNT + 1)]
            at_once = await crowd.all([Attach(row.id) for row in crowd.rows])
            await crowd.detach(crowd.rows[-1])
            told["first"].clear()
            told["detach"].clear()
            for number in range(ROUNDS):
                turns: list[Callable[[], Awaitable[None]]] = [
                    partial(at_the, "first", lone, 1),
                    by_hand,
                    partial(at_the, "last", crowd, COUNT),
                ]
                for turn in turns if number % 2 else reversed(turns):
                    await turn()
    return {**told, "at_once": at_once}


def _ms(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def main() -> None:
    """Measures in a namespace of this process."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNET) != 0:
        raise SystemExit("there can be no network namespace")
    print(json.dumps(trio.run(_measure)))


if __name__ == "__main__":
    main()
