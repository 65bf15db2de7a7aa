"""Measures many idle VMs on one host: what they take of it, how soon they answer, and what limits their number."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import trio

from tests.system.kit import Daemon
from volant.host import Host

from ._boot import BOOT_S, WANTED, cpu_s
from ._clones import pss_mb
from ._figure import Figure, percentile
from ._first_exec import execute
from ._serving import probe
from ._template import first_template
from ._world import current_image, volantd

VMS = 200
EXEC_MS = 100.0
_AT_ONCE = 8
_CALM_S = 15.0
"""Until guests have finished deferred work."""
_DELETE_S = 90.0


async def idle_fleet(count: int = VMS, idle_s: float = 60.0) -> list[Figure]:
    """Creates `count` VMs from the template, as far as the host takes them."""
    current_image()
    with volantd("--templates", "auto", "--standby", "auto") as daemon:
        await first_template(daemon)
        free_before_mb = Host().machine.memory_available_mb()
        began = time.monotonic()
        vms, refused = await create_fleet(daemon, count)
        took_s = time.monotonic() - began
        try:
            await trio.sleep(_CALM_S)
            figures = await measure_fleet(daemon, vms, idle_s, free_before_mb)
        finally:
            with trio.move_on_after(_DELETE_S, shield=True):
                await delete_fleet(daemon, vms)
    print(f"idle_fleet: {len(vms)} of {count} VMs in {took_s:.0f} s{refused and f', then {refused}'}", flush=True)
    return figures


async def create_fleet(daemon: Daemon, count: int) -> tuple[dict[str, int], str]:
    """Creates VMs until one is refused; returns the processes by name, and the refusal or an empty text."""
    vms: dict[str, int] = {}
    refused = ""
    names = iter([f"vm{number}" for number in range(count)])

    async def create_some() -> None:
        nonlocal refused
        async with daemon.http() as http:
            for name in names:
                body = {"name": name, "cpu_cores": 1, "memory_mb": WANTED.memory_mb, "boot": "template"}
                url = f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s"
                made = await http.post(url, json=body, timeout=2 * BOOT_S)
                if made.headers.get("volant-wait") == "met":
                    vms[name] = made.json()["pid"]
                else:
                    refused = refused or f"{made.status_code} {made.text}"
                if refused:
                    return

    async with trio.open_nursery() as nursery:
        for _ in range(_AT_ONCE):
            nursery.start_soon(create_some)
    return vms, refused


async def delete_fleet(daemon: Daemon, vms: dict[str, int]) -> None:
    """Deletes the VMs, some at a time."""
    names = iter(list(vms))

    async def delete_some() -> None:
        async with daemon.http() as http:
            for name in names:
                (await http.delete(f"/api/v1/vms/{name}", timeout=_DELETE_S)).raise_for_status()

    async with trio.open_nursery() as nursery:
        for _ in range(_AT_ONCE):
            nursery.start_soon(delete_some)


async def measure_fleet(daemon: Daemon, vms: dict[str, int], idle_s: float, free_before_mb: int) -> list[Figure]:
    """Returns the figures of VMs that are idle by now. `free_before_mb`: the host's free memory without them."""
    fleet = f"idle_fleet_{len(vms)}"
    free_mb = Host().machine.memory_available_mb()
    host, began, daemon_s = _HostTime.read(), time.monotonic(), cpu_s(daemon.pid)
    await trio.sleep(idle_s)
    idle, steal = host.since(_HostTime.read())
    daemon_percent = 100 * (cpu_s(daemon.pid) - daemon_s) / (time.monotonic() - began)
    async with daemon.http() as http:
        (await http.get("/healthz")).raise_for_status()
        first_ms, second_ms = [[await _exec_ms(http, name) for name in vms] for _ in range(2)]
    healthz_ms = [1000 * took for took in await probe(daemon)]
    taken_mb = (free_before_mb - free_mb) / len(vms)
    return [
        Figure(
            f"{fleet}_host", 100 * idle, "% idle",
            to=f"all processors over {idle_s:g} s, {100 * steal:.2g} % taken by other machines; the daemon used "
            f"{daemon_percent:.2g} % of one",
        ),
        Figure(
            f"{fleet}_exec", percentile(first_ms, 95), "ms", within=EXEC_MS,
            to=f"p95 of a first command in each, one at a time, p50 {median(first_ms):.3g}; of a second one p95 "
            f"{percentile(second_ms, 95):.3g}, p50 {median(second_ms):.3g}",
        ),
        Figure(
            f"{fleet}_memory", sum(pss_mb(pid) for pid in vms.values()) / len(vms), "MiB a VM",
            to=f"PSS of its QEMU; the host has {taken_mb:.0f} MiB less free for each",
        ),
        Figure(
            f"{fleet}_healthz", percentile(healthz_ms, 99), "ms", to=f"p99, median {median(healthz_ms):.2g}"
        ),
        _room(daemon, vms, fleet, taken_mb, free_mb),
    ]  # fmt: skip


async def _exec_ms(http: httpx.AsyncClient, name: str) -> float:
    began = time.perf_counter()
    await execute(http, name)
    return 1000 * (time.perf_counter() - began)


def _room(daemon: Daemon, vms: dict[str, int], fleet: str, taken_mb: float, free_mb: int) -> Figure:
    """Returns how many such VMs the scarcest resource is enough for."""
    descriptors = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) / len(vms)
    threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in vms.values()) / len(vms)
    room = {
        "memory": len(vms) + free_mb / taken_mb,
        "descriptors of the daemon": resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0] / descriptors,
        "process ids": int(Path("/proc/sys/kernel/pid_max").read_text()) / threads,
    }
    scarcest = min(room.values())
    words = ", ".join(f"{name} {enough:.0f}" for name, enough in sorted(room.items(), key=lambda each: each[1]))
    return Figure(
        f"{fleet}_room", scarcest, "VMs", to=f"{words}; {descriptors:.2g} descriptors and {threads:.2g} threads a VM"
    )


@dataclass(frozen=True)
class _HostTime:
    """The time of all processors so far, in ticks."""

    total: int
    idle: int
    steal: int

    @classmethod
    def read(cls) -> _HostTime:
        """Reads `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(sum(ticks), ticks[3] + ticks[4], ticks[7])

    def since(self, later: _HostTime) -> tuple[float, float]:
        """Returns the shares of the time in between that the processors were idle, and taken by other machines."""
        total = later.total - self.total
        return (later.idle - self.idle) / total, (later.steal - self.steal) / total
