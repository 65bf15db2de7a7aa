"""Measures lists of a large fleet: 10,000 VMs on 100 hosts, of which one is a real daemon without VMs.

The other hosts are fakes that answer at once, behind the TLS of hosts (`tests.bench._fleet_peers`). What the fleet has
of them and their VMs is in a real etcd, which the daemon mirrors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

import httpx
import msgspec
import trio

from tests.fleet.cluster import Cluster, cluster
from tests.fleet.hosts import NO_BOOT, FleetOfHosts, HostOfFleet
from volant.fleet import Claim, Step, open_etcd, put
from volant.fleet._membership import HostRecord
from volant.model import Desired, HostFacts, HostLoad, Status, VmRecord

from ._figure import Figure, Pairs, percentile
from ._fleet_peers import name_of, vms_of
from ._world import listening, scratch

HOSTS, VMS_OF_ONE = 100, 100
PAGE_MS = 50.0
_PAGE = 100
_STEPS = 100
_PREFIX = "volant/"
_S = 60.0


async def fleet_list(pages: int = 50, lists: int = 5) -> list[Figure]:
    """The first page through a host that has none of its VMs, beside the same one of the host that has them; and the
    whole list."""
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        etcd = stack.enter_context(cluster(directory, tls=True))
        authority = etcd.authority
        assert authority is not None
        own = HostOfFleet("own", etcd, directory, *NO_BOOT)
        # `fleet` would delete the VMs of all hosts at its end.
        stack.callback(own.daemon.discard)
        found = FleetOfHosts(etcd, [own])
        certificate = authority.issue("peers.example", client=True, server=True)
        arguments = (str(certificate), str(authority.path), str(HOSTS), str(VMS_OF_ONE))
        with listening("tests.bench._fleet_peers", *arguments) as ports:
            await etcd.ready()
            await _write(etcd, [int(port) for port in ports.split(",")])
            own.daemon.start()
            await found.sees("own", lambda hosts: sum(host["state"] == "up" for host in hosts) == HOSTS + 1)
            async with own.http() as http:
                one = {"Volant-Host": name_of(1)}
                pairs = Pairs()
                for number in range(pages + 1):
                    took = [await _list_s(http, f"?limit={_PAGE}", _PAGE, headers) for headers in ({}, one)]
                    if number:
                        # The first ones load code.
                        pairs.add(*took)
                whole = [await _list_s(http, "", HOSTS * VMS_OF_ONE, {}) for _ in range(lists)]
    return [
        Figure(
            "fleet_list", 1000 * pairs.value, "ms", pairs.ratio,
            f"the same page of its host alone; p95 {1000 * percentile(pairs.ours, 95):.3g} ms", within=PAGE_MS,
        ),
        Figure("fleet_list_whole", min(whole), "s", to=f"{HOSTS * VMS_OF_ONE} VMs of {HOSTS} hosts without a limit"),
    ]  # fmt: skip


async def _list_s(http: httpx.AsyncClient, query: str, count: int, headers: dict[str, str]) -> float:
    """Returns the seconds of a list. :raises RuntimeError: it is not the whole one"""
    began = time.perf_counter()
    answer = await http.get(f"/api/v1/vms{query}", headers=headers, timeout=_S)
    took_s = time.perf_counter() - began
    if answer.status_code != 200:
        raise RuntimeError(f"there is no list: {answer.text}")
    if missing := answer.headers.get("Volant-Missing-Hosts"):
        raise RuntimeError(f"after {took_s:.3g} s, some hosts are missing in the list: {missing}")
    if len(answer.json()) != count:
        raise RuntimeError(f"the list has {len(answer.json())} VMs instead of {count}")
    return took_s


async def _write(cluster: Cluster, ports: list[int]) -> None:
    """Writes what a fleet has of its hosts and their VMs."""
    async with open_etcd(cluster.settings()) as etcd:
        steps = list(_steps(ports))
        for begin in range(0, len(steps), _STEPS):
            with trio.fail_after(_S):
                await etcd.transact([], steps[begin : begin + _STEPS])


def _steps(ports: list[int]) -> Iterator[Step]:
    now = datetime.now(UTC)
    for number, port in enumerate(ports, 1):
        name = name_of(number)
        facts = HostFacts(
            address=f"127.0.0.1:{port}", version="", architecture="x86_64", cpu_cores=64, memory_mb=262_144
        )
        values: dict[str, object] = {
            f"hosts/{name}": HostRecord(f"{number:032x}", number, facts),
            f"load/{name}": HostLoad(vms=VMS_OF_ONE, cpu_cores=VMS_OF_ONE, free_memory_mb=131_072),
        }
        for shown in vms_of(number, VMS_OF_ONE):
            values[f"vms/default/{shown['name']}"] = Claim(f"{shown['id']:032x}", name, 1)
            values[f"records/default/{shown['name']}"] = VmRecord(
                host=name, id=int(str(shown["id"])), status=Status.RUNNING, desired=Desired.RUNNING, plugin="base",
                runtime="base", cpu_cores=1, memory_mb=256, created_at=now, updated_at=now,
            )  # fmt: skip
        for key, value in values.items():
            yield put(_PREFIX + key, msgspec.json.encode(value))
        yield put(f"{_PREFIX}numbers/{number}", name.encode())
        # Without a lease: it lasts as long as the benchmark.
        yield put(f"{_PREFIX}alive/{name}", name.encode())
