"""Measures how long a VM is away whose host dies, until the first command on the new one."""

from __future__ import annotations

import time
from statistics import median

import httpx
import trio

from tests.fleet.hosts import TTL_S, fleet
from volant.fleet import SLACK_S

from ._boot import BOOT_S, WANTED
from ._figure import Figure
from ._first_exec import execute
from ._template import first_template
from ._world import current_image, scratch

EXTRA_S = 2.0
_AGAIN_S = 0.1


async def failover(rounds: int = 3) -> list[Figure]:
    """With a template on the new host, and with a cold boot. The daemon that dies leaves its VM to the watchdog."""
    current_image()
    figures = []
    waits_s = TTL_S + SLACK_S
    for boot in ("template", "cold"):
        took = []
        with scratch() as directory, fleet(directory, "h1", "h2", flags=("--templates", "auto")) as found:
            await found.cluster.ready()
            await found.up()
            await first_template(found["h1"].daemon, "h1")
            for number in range(rounds):
                body = {
                    "name": f"moves{number}", "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb,
                    "failover": "restart", "boot": boot,
                }  # fmt: skip
                async with found["h2"].http() as http:
                    made = await http.post(
                        f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, headers={"Volant-Host": "h2"}
                    )
                    made.raise_for_status()
                async with found["h1"].http() as http:
                    began = time.perf_counter()
                    found["h2"].daemon.kill()
                    await _until_it_answers(http, f"moves{number}")
                    took.append(time.perf_counter() - began)
                    found["h2"].daemon.start()
                    await found.up()
                    (await http.delete(f"/api/v1/vms/moves{number}", timeout=BOOT_S)).raise_for_status()
        figures.append(
            Figure(
                f"failover_{boot}", median(took), "s", to=f"TTL and slack are {waits_s:g} s",
                within=waits_s + EXTRA_S if boot == "template" else None,
            )
        )  # fmt: skip
    return figures


async def _until_it_answers(http: httpx.AsyncClient, name: str) -> None:
    with trio.fail_after(BOOT_S):
        while True:
            shown = await http.get(f"/api/v1/vms/{name}")
            if shown.status_code == 200 and shown.json()["move"] and shown.json()["status"] == "running":
                return await execute(http, name)
            await trio.sleep(_AGAIN_S)
