"""Measures the cost of a hostile guest for others; `tests/system/hostile.py` describes its behaviours."""

from __future__ import annotations

import trio

from tests.system.hostile import OTHER, boot_evil, delete_evil, hostile_plugin, noticing, turn
from tests.system.kit import boot, cache_dir

from ._figure import Figure
from ._world import current_image, scratch, volantd

LONG_S = 3.0
BEHAVIOURS = ("settings", "line-feeds", "forks")


async def hostile_guest() -> list[Figure]:
    """The slowest answer of another VM to a command, beside a quiet and a hostile guest; and the daemon's cost."""
    current_image()
    figures: list[Figure] = []
    with scratch() as directory, volantd() as daemon:
        async with daemon.client() as client:
            await client.plugins.install(hostile_plugin(directory, cache_dir()))
            await boot(client, OTHER)
            for behaviour in BEHAVIOURS:
                await boot_evil(client)
                async with noticing(daemon, client) as quiet:
                    await trio.sleep(LONG_S)
                await turn(client, behaviour)
                async with noticing(daemon, client) as noticed:
                    await trio.sleep(LONG_S)
                await delete_evil(client, noticed)
                name = f"hostile_guest_{behaviour.replace('-', '_')}"
                ratio = noticed.slowest_s / quiet.slowest_s
                figures += [
                    Figure(f"{name}_slowest_answer", noticed.slowest_s, "s", ratio, "that beside it when it was quiet"),
                    Figure(f"{name}_slowest_healthz", noticed.slowest_healthz_s, "s"),
                    Figure(f"{name}_daemon_grows", noticed.grown_mb, "MiB"),
                    Figure(f"{name}_daemon_cpu", noticed.cpu, "of a processor"),
                    Figure(f"{name}_deleted", noticed.deleted_s, "s"),
                ]
            await client.vms.delete(OTHER)
    return figures
