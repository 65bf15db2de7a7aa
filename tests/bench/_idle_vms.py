"""Measures what an idle VM costs: VMs that booted cold and clones, with and without a network, in the same minute.

`python -m tests.bench._idle_vms NETWORK…` measures, in the network namespace that it was started in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import httpx
import trio

from tests.system.kit import REPOSITORY
from tests.system.netns import IN_ITS_OWN
from volant.host._procfs import wakeups

from ._boot import BOOT_S, WANTED
from ._clones import cpu_ns, create
from ._figure import Figure
from ._network import check_bridge
from ._world import Skipped, current_image, volantd

EACH = 5
"""VMs of each kind."""
VM_PERCENT = 0.1
_SETTLE_S = 30.0
"""Guests finish deferred work within half a minute of their boot."""
_IDLE_S = 60.0
"""A minute, so that work done once a minute counts, too."""


async def idle_vms() -> list[Figure]:
    """Processor time and wake-ups of an idle VM of each kind. :raises Skipped: without an image"""
    current_image()
    networks, namespace = ["none", "bridge"], [*IN_ITS_OWN]
    try:
        check_bridge()
    except Skipped as why:
        print(f"idle VMs with a network skipped: {why}", flush=True)
        networks, namespace = ["none"], []
    done = await trio.run_process(
        [*namespace, sys.executable, "-m", "tests.bench._idle_vms", *networks],
        cwd=REPOSITORY, capture_stdout=True, check=True,
    )  # fmt: skip
    return [
        Figure(
            f"idle_vm_{kind}", percent, "% of a processor", within=VM_PERCENT,
            to=f"{woken:.3g} wake-ups a second; each of {EACH} VMs, over {_IDLE_S:g} s",
        )
        for kind, (percent, woken) in json.loads(done.stdout.splitlines()[-1]).items()
    ]  # fmt: skip


async def _measure(networks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns the percentage of a processor and the wake-ups a second for each kind."""
    with volantd("--network", networks[-1], "--templates", "auto") as daemon:
        pids: dict[str, list[int]] = {}

        async def create_all(boot: str, network: str) -> None:
            kind = ("clone" if boot == "template" else boot) + ("" if network == "none" else "_network")
            async with daemon.http() as http:
                for number in range(EACH):
                    vm = await create(http, f"{kind.replace('_', '-')}{number}", boot, network)
                    pids.setdefault(kind, []).append(vm["pid"])

        async with daemon.http() as http:
            for network in networks:
                await _build_template(http, network)
        async with trio.open_nursery() as nursery:
            for boot in ("cold", "template"):
                for network in networks:
                    nursery.start_soon(create_all, boot, network)
        await trio.sleep(_SETTLE_S)
        began = time.monotonic()
        before = {pid: (cpu_ns(pid), wakeups(pid)) for each in pids.values() for pid in each}
        await trio.sleep(_IDLE_S)
        took_s = time.monotonic() - began
        return {
            kind: (
                sum(cpu_ns(pid) - before[pid][0] for pid in each) / 1e7 / took_s / len(each),
                sum(wakeups(pid) - before[pid][1] for pid in each) / took_s / len(each),
            )
            for kind, each in sorted(pids.items())
        }


async def _build_template(http: httpx.AsyncClient, network: str) -> None:
    like = {"cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb, "network": network}
    (await http.post("/api/v1/templates", json=like, timeout=2 * BOOT_S)).raise_for_status()


if __name__ == "__main__":
    print(json.dumps(trio.run(_measure, sys.argv[1:])))
