"""Measures what a network adds to a clone: VMs with and without one in turns, by one daemon with a bridge.

`python -m tests.bench._networked_clone` measures, in its own network namespace.
"""

from __future__ import annotations

import json
import sys

import trio

from tests.system.kit import REPOSITORY, Daemon
from tests.system.netns import IN_ITS_OWN

from ._boot import BOOT_S, WANTED, Ours
from ._figure import Figure, Pairs, percentile
from ._network import check_bridge
from ._world import current_image, volantd

PAIRS = 10
_SETTLE_S = 0.3
_NETWORKS = ("bridge", "none")


async def networked_clone() -> list[Figure]:
    """Clones, and VMs from the warm pool. :raises Skipped: without root, nft or an image"""
    check_bridge()
    current_image()
    done = await trio.run_process(
        [*IN_ITS_OWN, sys.executable, "-m", "tests.bench._networked_clone"],
        cwd=REPOSITORY, capture_stdout=True, check=True,
    )  # fmt: skip
    figures = []
    for name, told in json.loads(done.stdout.splitlines()[-1]).items():
        pairs = Pairs(told["bridge"], told["none"])
        what = f"the same without one, {PAIRS} pairs, p95 {percentile(pairs.ours, 95):.3g} s"
        figures.append(Figure(f"networked_{name}", pairs.value, "s", pairs.ratio, what))
    return figures


async def _measure() -> dict[str, dict[str, list[float]]]:
    told = {}
    for name, waiting in (("clone", 0), ("standby", 1)):
        with volantd("--network", "bridge", "--templates", "auto", "--standby", str(waiting)) as daemon:
            sides = {network: Ours(daemon, boot="template", network=network) for network in _NETWORKS}
            async with daemon.http() as http:
                for network in _NETWORKS:
                    like = {"cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb, "network": network}
                    (await http.post("/api/v1/templates", json=like, timeout=2 * BOOT_S)).raise_for_status()
            for side in sides.values():
                await side.boot()
            took: dict[str, list[float]] = {network: [] for network in _NETWORKS}
            for _ in range(PAIRS):
                for network, side in sides.items():
                    await _until_waiting(daemon, waiting * len(sides))
                    await trio.sleep(_SETTLE_S)
                    took[network].append(await side.boot())
            told[name] = took
    return told


async def _until_waiting(daemon: Daemon, count: int) -> None:
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            while f"volant_standby_waiting {count:.1f}" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
                await trio.sleep(_SETTLE_S)


if __name__ == "__main__":
    print(json.dumps(trio.run(_measure)))
