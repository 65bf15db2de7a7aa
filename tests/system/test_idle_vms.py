"""An idle VM sleeps: its process wakes up some times a second, and `inspect` counts that."""

from __future__ import annotations

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot
from volant.client import Client

_WINDOW_S = 5.0
_MOST_PER_S = 25
"""An idle VM wakes up less than ten times a second. With QEMU's HPET it was 290 times."""


@pytest.mark.full
@pytest.mark.parametrize("how", ["cold", "template"])
async def test_an_idle_vm_rarely_wakes_up(daemon: Daemon, how: str) -> None:
    async with daemon.client() as client:
        assert (await boot(client, "idle", boot=how)).booted_from == how
        seen: list[float] = []
        with trio.move_on_after(BOOT_S):
            # After its boot a guest still has something to do for some seconds.
            while not seen or seen[-1] > _MOST_PER_S:
                before = await wakeups(client, "idle")
                await trio.sleep(_WINDOW_S)
                seen.append((await wakeups(client, "idle") - before) / _WINDOW_S)
        assert seen[-1] <= _MOST_PER_S, seen


async def wakeups(client: Client, name: str) -> int:
    """Returns how often the threads of a VM's process have woken up."""
    inspected = await client.vms.inspect(name)
    total: int = inspected["actor"]["actor"]["process"]["wakeups"]["total"]
    return total
