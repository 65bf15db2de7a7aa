"""VMs survive the death of the daemon, and no console output of that time is lost."""

from __future__ import annotations

from collections.abc import Callable

import trio

from tests.system.kit import Daemon, boot, is_alive, run, runs_on
from volant.client import Client, LogLine

LINES = 4000


async def console_lines(client: Client, name: str, last: str) -> list[str]:
    """Returns the lines of the console up to `last`."""
    lines: list[str] = []
    with trio.fail_after(90):
        async with client.vms.logs(name, since=0, streams=["console"]) as log:
            while not lines or lines[-1] != last:
                item = await log.receive()
                assert isinstance(item, LogLine), item
                lines.append(item.line)
    return lines


async def test_a_vm_keeps_running_while_the_daemon_is_replaced(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        vm = await boot(client, "demo")
        stopped = await boot(client, "idle")
        assert (await client.vms.apply_and_wait("idle", "stop", ["stopped"])).outcome == "met"
        newest = await client.newest_event()
    assert vm.pid is not None

    assert daemon.stop() == 0
    assert list(daemon.hypervisors()) == [vm.pid]

    async with daemon.started() as client:
        await runs_on(client, vm)
        idle = await client.vms.get("idle")
        assert (idle.id, idle.status) == (stopped.id, "stopped")
        # Adoption causes no event.
        assert await client.newest_event() == newest
        assert (await client.system.info())["orphans"] == []
        # The daemon can stop an adopted process like a child of its own.
        await client.vms.delete("demo")
        assert not is_alive(vm.pid)


async def test_no_line_of_the_console_is_lost_or_repeated_when_the_daemon_is_killed(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon(ephemeral=False)
    writer = f"setsid sh -c 'for i in $(seq 1 {LINES}); do echo line $i; done >/dev/console' >/dev/null 2>&1 &"
    async with daemon.client() as client:
        vm = await boot(client, "demo")
        newest = await client.newest_event()
        async with client.vms.logs("demo", tail=0, streams=["console"]) as log:
            await run(client, "demo", "sh", "-c", writer)
            # Kill the daemon during the flood, while a client reads it.
            with trio.fail_after(30):
                while (item := await log.receive()) and isinstance(item, LogLine) and item.line != "line 100":
                    pass
            daemon.kill()
    assert list(daemon.hypervisors()) == [vm.pid]

    daemon.start()
    async with daemon.client() as client:
        lines = await console_lines(client, "demo", f"line {LINES}")
        numbered = [line for line in lines if line.startswith("line ")]
        assert numbered == [f"line {i}" for i in range(1, LINES + 1)]
        assert await client.newest_event() == newest
        await runs_on(client, vm)
