"""Measures many clones: twenty created at once, against twenty by a script; and fifty idle ones.

The script is that of `_template.py`. It starts as many clones at a time as the daemon does, so that both share the
processors in the same way. The daemon has its default settings: some of the twenty come from the warm pool.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
import trio

from tests.system.clones import Who, who
from tests.system.kit import Daemon
from volant.hypervisor import MachineSpec, Template
from volant.vm import clones_at_once

from ._boot import BOOT_S, WANTED, _accelerator, _argv, _spec, scratch_of
from ._figure import Figure, Pairs, percentile
from ._template import BareClone, _template
from ._world import current_image, volantd

AT_ONCE = 20
AT_ONCE_TARGET = 0.9
AT_ONCE_SLOWEST = 1.1
MANY = 50
CLOCK_MS = 50.0
CLONE_MB = 45.0
"""A tenth more than measured."""

_BARE_AT_ONCE = clones_at_once(len(os.sched_getaffinity(0)))
_SETTLE_S = 2.0
_POOL_S = 4.0
"""Longer than the warm pool takes to start a process, the pause before it included."""
_CALM_S = 10.0
"""Wait until guests have finished deferred work."""


async def creates_at_once(rounds: int = 3) -> list[Figure]:
    """Twenty clones at once, by the daemon and by the script in turns."""
    image = current_image()
    throughput, slowest = Pairs(), Pairs()
    each_s: list[float] = []
    overtaken: list[int] = []
    with ExitStack() as stack:
        daemon = stack.enter_context(volantd("--templates", "auto", "--standby", "auto"))
        accelerator = await _accelerator(daemon)
        directory = await _template(daemon)
        specs = [_clone_of(directory, stack.enter_context(_spec(image, accelerator))) for _ in range(AT_ONCE)]
        bare = [(spec, BareClone(spec, await _argv(spec))) for spec in specs]
        async with _clients(daemon, AT_ONCE) as clients:
            for _ in range(rounds):
                await until_pool_is_quiet(daemon)
                by_hand = await _bare_at_once(bare)
                await trio.sleep(_SETTLE_S)
                created = await _ours_at_once(clients)
                ours = [each.ran_after_s for each in created]
                each_s += ours
                overtaken.append(_most_overtaken(created))
                throughput.add(AT_ONCE / max(ours), AT_ONCE / max(by_hand))
                slowest.add(percentile(ours, 95), percentile(by_hand, 95))
    return [
        Figure(
            f"creates_{AT_ONCE}_at_once", throughput.value, "VMs a second", throughput.ratio,
            f"{AT_ONCE} bare clones' {throughput.other:.3g} a second, both with {_BARE_AT_ONCE} under way at a time, "
            f"{rounds} rounds; a VM ran after {median(each_s):.3g} s",
            at_least=AT_ONCE_TARGET,
        ),
        Figure(
            f"creates_{AT_ONCE}_at_once_p95", slowest.value, "s", slowest.ratio,
            f"the bare clones' {slowest.other:.3g} s", at_most=AT_ONCE_SLOWEST,
        ),
        Figure(
            f"creates_{AT_ONCE}_at_once_order", max(overtaken), "VMs", within=2 * _BARE_AT_ONCE,
            to="that were created after another one, and ran before it",
        ),
    ]  # fmt: skip


async def many_clones(idle_s: float = 60.0) -> list[Figure]:
    """Fifty clones: their identities, the memory of each, and their cost while idle."""
    image = current_image()
    with ExitStack() as stack:
        daemon = stack.enter_context(volantd("--templates", "auto"))
        accelerator = await _accelerator(daemon)
        directory = await _template(daemon)
        spec = _clone_of(directory, stack.enter_context(_spec(image, accelerator)))
        bare = BareClone(spec, await _argv(spec))
        async with daemon.http() as http:
            cold = await create(http, "cold", boot="cold")
            cold_pss_mb = pss_mb(cold["pid"])
            (await http.delete("/api/v1/vms/cold", timeout=BOOT_S)).raise_for_status()
        async with _clients(daemon, MANY) as clients:
            made = await _create_at_once(clients)
        pids = [each.vm["pid"] for each in made]
        stack.enter_context(scratch_of(spec))
        async with bare.running() as process:
            await trio.sleep(_CALM_S)
            # Before their first command, which translates more code.
            shared, of_script_mb = [pss_mb(pid) for pid in pids], pss_mb(process.pid)
            found = await _look(daemon, [each.vm["name"] for each in made])
            await trio.sleep(_CALM_S)
            watched = [*pids, daemon.pid, process.pid]
            before = [cpu_ns(pid) for pid in watched]
            await trio.sleep(idle_s)
            *used, of_daemon, of_bare = (
                100 * (cpu_ns(pid) - then) / 1e9 / idle_s for pid, then in zip(watched, before, strict=True)
            )
    beyond = sum(used) - MANY * of_bare
    off_ms = [1000 * abs(each.clock_off_s) for each in found]
    way_ms = 1000 * max(each.clock_way_s for each in found) / 2
    return [
        Figure(
            f"clones_{MANY}_clock", max(off_ms), "ms", within=CLOCK_MS,
            to=f"the furthest from the host's, median {median(off_ms):.3g} ms; measured to ±{way_ms:.2g} ms or better",
        ),
        Figure(
            f"clones_{MANY}_memory", median(shared), "MiB a clone", median(shared) / of_script_mb,
            f"a bare script's {of_script_mb:.3g} MiB for the same clone without an identity (PSS), p95 "
            f"{percentile(shared, 95):.3g}; a cold VM has {cold_pss_mb:.0f}",
            within=CLONE_MB,
        ),
        Figure(
            f"clones_{MANY}_idle", sum(used), "% of a processor", sum(used) / MANY / of_bare if of_bare else None,
            f"{MANY} idle bare clones at {of_bare:.2g} % each; {beyond:.2g} % beyond, over {idle_s:g} s",
        ),
        Figure(f"clones_{MANY}_idle_daemon", of_daemon, "% of a processor", to="the daemon's, meanwhile", within=1.0),
    ]  # fmt: skip


def pss_mb(pid: int) -> float:
    """Returns the proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the kernel says nothing of the memory of process {pid}")


def cpu_ns(pid: int) -> int:
    """Returns the processor time of all threads of a process so far; finer than `cpu_s`."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def _clone_of(directory: Path, spec: MachineSpec) -> MachineSpec:
    return msgspec.structs.replace(spec, template=Template(directory / "memory", directory / "state"))


@asynccontextmanager
async def _clients(daemon: Daemon, count: int) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Gives `count` clients, each connected already."""
    clients = []
    async with AsyncExitStack() as stack:
        for _ in range(count):
            http = await stack.enter_async_context(daemon.http())
            (await http.get("/healthz")).raise_for_status()
            clients.append(http)
        yield clients


async def create(http: httpx.AsyncClient, name: str, boot: str, network: str = "none") -> dict[str, Any]:
    """Creates a VM and asks its agent; returns the VM. :raises RuntimeError: if it did not begin as `boot` says"""
    body: dict[str, object] = {"name": name, "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb}
    body |= {"boot": boot, "network": network}
    made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=2 * BOOT_S)
    info = await http.get(f"/api/v1/vms/{name}/agent/v1/info", timeout=BOOT_S)
    vm: dict[str, Any] = made.json()
    if made.headers.get("volant-wait") != "met" or vm["booted_from"] != boot or info.json().get("hostname") != name:
        raise RuntimeError(f"VM {name} did not become what it should: {made.text} {info.text}")
    return vm


@dataclass(frozen=True)
class _Created:
    vm: dict[str, Any]
    ran_after_s: float
    """Seconds from the first request of all until its agent answered."""


async def _create_at_once(clients: list[httpx.AsyncClient]) -> list[_Created]:
    """Creates a clone with each client."""
    created = []
    began = time.perf_counter()

    async def one(http: httpx.AsyncClient, number: int) -> None:
        vm = await create(http, f"clone{number}", "template")
        created.append(_Created(vm, time.perf_counter() - began))

    async with trio.open_nursery() as nursery:
        for number, http in enumerate(clients):
            nursery.start_soon(one, http, number)
    return created


def _most_overtaken(created: list[_Created]) -> int:
    """Returns how many VMs with a later id at most ran before one."""
    ids: list[int] = [each.vm["id"] for each in sorted(created, key=lambda each: each.ran_after_s)]
    return max(sum(other > each for other in ids[:place]) for place, each in enumerate(ids))


async def _ours_at_once(clients: list[httpx.AsyncClient]) -> list[_Created]:
    """Creates and deletes clones."""
    created = await _create_at_once(clients)

    async def remove(http: httpx.AsyncClient, name: str) -> None:
        (await http.delete(f"/api/v1/vms/{name}", timeout=BOOT_S)).raise_for_status()

    async with trio.open_nursery() as nursery:
        for http, each in zip(clients, created, strict=True):
            nursery.start_soon(remove, http, each.vm["name"])
    return created


async def _bare_at_once(bare: list[tuple[MachineSpec, BareClone]]) -> list[float]:
    """Starts and kills clones; returns the seconds until each answered."""
    turns = trio.CapacityLimiter(_BARE_AT_ONCE)
    over = trio.Event()
    took: list[float] = []

    async def one(clone: BareClone, began: float) -> None:
        async with AsyncExitStack() as stack:
            async with turns:
                await stack.enter_async_context(clone.running())
            took.append(time.perf_counter() - began)
            if len(took) == len(bare):
                over.set()
            await over.wait()

    with ExitStack() as scratches:
        for spec, _ in bare:
            scratches.enter_context(scratch_of(spec))
        async with trio.open_nursery() as nursery:
            began = time.perf_counter()
            for _, clone in bare:
                nursery.start_soon(one, clone, began)
    return took


async def until_pool_is_quiet(daemon: Daemon) -> None:
    """Waits until the warm pool has started no process for a while."""
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            before, now = "", await _pool(http)
            while now != before:
                await trio.sleep(_POOL_S)
                before, now = now, await _pool(http)


async def _pool(http: httpx.AsyncClient) -> str:
    lines = (await http.get("/metrics")).text.splitlines()
    return "\n".join(line for line in lines if line.startswith("volant_standby_"))


async def _look(daemon: Daemon, names: list[str]) -> list[Who]:
    """Returns the identity of each. :raises RuntimeError: if two are equal in any part"""
    async with daemon.client() as client:
        found = [await who(client, name) for name in names]
    for what in ("random_uuid", "urandom", "boot_id", "machine_id", "hostname"):
        if len({getattr(each, what) for each in found}) < len(names):
            raise RuntimeError(f"two clones have the same {what}")
    return found
