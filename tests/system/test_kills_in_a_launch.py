"""The daemon is killed 0 to 100 ms after it answered a create; the next daemon continues the launch.

QEMU outlives the daemon. It waits for the template's state, loads it, or has loaded it and waits for `cont`.

`VOLANT_TEST_LAUNCH_KILLS` is the number of tries for each kind of launch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import trio

from tests.ports import free_port
from tests.system.kit import BOOT_S, Daemon, Stopwatch, boot, load, reachable, spec
from volant.client import Client
from volant.model import ForkVm, RestoreVm, TakeSnapshot

TRIES = load("VOLANT_TEST_LAUNCH_KILLS", usual=4, full=30)
LATEST_S = 0.1
FLAGS = {"standby": ("--standby", "1")}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "booted_from"),
    [
        ("clone", "template"),
        ("standby", "template"),
        ("fork", "fork"),
        ("restore", "snapshot"),
    ],
)
async def test_a_launch_continues_after_the_daemon_is_killed(
    make_daemon: Callable[..., Daemon], kind: str, booted_from: str
) -> None:
    daemon = make_daemon("--listen", f"127.0.0.1:{free_port()}", *FLAGS.get(kind, ()), ephemeral=False)
    async with daemon.client() as client:
        first = await boot(client, "first")
        assert first.booted_from == "template", first
        if kind == "restore":
            await client.snapshots.take("first", TakeSnapshot(name="warm"))
    took = []
    for number in range(TRIES):
        name = f"try-{number}"
        if kind == "standby":
            async with daemon.client() as client:
                # The warm pool is filled once the daemon has created a VM from the template.
                await boot(client, "earlier")
                await one_waits(daemon)
                await client.vms.delete("earlier")
        async with daemon.client() as client:
            made = await make(client, kind, name)
        await trio.sleep(LATEST_S * number / max(1, TRIES - 1))
        daemon.kill()
        await trio.to_thread.run_sync(daemon.start)
        watch = Stopwatch()
        async with daemon.client() as client:
            waited = await client.vms.wait(name, ["running"], timeout_s=BOOT_S)
            took.append(watch.seconds)
            vm = waited.vm
            assert waited.outcome == "met", (number, waited)
            assert vm is not None
            assert (vm.id, vm.booted_from, vm.fallback, vm.reason, vm.boots) == (made, booted_from, None, None, 1)
            await reachable(client, name)
            assert [each.state for each in await client.templates.list()] == ["ready"]
            await client.vms.delete(name)
    print(f"{kind}: {TRIES} kills, running after {statistics.median(took):.2f} s (median), {max(took):.2f} s (longest)")


async def make(client: Client, kind: str, name: str) -> int:
    """Creates a VM; returns its id."""
    if kind == "fork":
        [copy] = await client.vms.fork("first", ForkVm(names=[name]))
        return copy.id
    if kind == "restore":
        return (await client.vms.create(RestoreVm(name=name, from_snapshot="warm"))).id
    return (await client.vms.create(spec(name))).id


async def one_waits(daemon: Daemon) -> None:
    """Waits until the warm pool has a process."""
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            while "volant_standby_waiting 1.0" not in (await http.get("/metrics")).text.splitlines():  # noqa: ASYNC110
                await trio.sleep(0.1)
