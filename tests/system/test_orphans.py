"""A guest outlives the loss of the daemon's database, and can be adopted as a VM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import trio

from tests.system.kit import Daemon, boot, is_alive, reachable, run
from volant.client import LogLine


def volar(daemon: Daemon, *words: str) -> Any:
    """Runs `volar --json`; returns its output."""
    command = [sys.executable, "-m", "volant.cli.main", "--json", *words]
    environ = {**daemon.environ, "VOLANT_API_BASE": daemon.base_url}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.strip() else None


async def test_guests_outlive_the_loss_of_the_database(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        vm, victim = await boot(client, "demo"), await boot(client, "victim")
        await run(client, "demo", "sh", "-c", "echo here before >/run/kept; echo before the loss >/dev/console")
    daemon.lose_database()

    async with daemon.started() as client:
        assert await client.vms.list() == []
        assert set(daemon.hypervisors()) == {vm.pid, victim.pid}
        found = {one["name"]: one for one in volar(daemon, "vms", "orphans")}
        assert {name: (one["pid"], one["adoptable"]) for name, one in found.items()} == {
            "demo": (vm.pid, True),
            "victim": (victim.pid, True),
        }
        assert "volar vms adopt" in daemon.log()

        again = volar(daemon, "vms", "adopt", found["demo"]["tag"])
        assert (again["id"], again["pid"], again["status"]) == (vm.id, vm.pid, "running")
        await reachable(client, "demo")
        assert await run(client, "demo", "cat", "/run/kept") == "here before\n"
        # The console continues in the same log.
        await run(client, "demo", "sh", "-c", "echo after the loss >/dev/console")
        with trio.fail_after(30):
            async with client.vms.logs("demo", since=0, streams=["console"]) as log:
                told: list[str] = []
                while "after the loss" not in told:
                    line = await log.receive()
                    assert isinstance(line, LogLine)
                    told.append(line.line)
        assert told.count("before the loss") == 1

        volar(daemon, "vms", "kill", found["victim"]["tag"])
        assert victim.pid is not None
        assert not is_alive(victim.pid)
        assert volar(daemon, "vms", "orphans") == []

    # It is an ordinary VM again: it survives the next restart, and stops cleanly.
    assert daemon.stop() == 0
    async with daemon.started() as client:
        assert (await client.vms.get("demo")).pid == vm.pid
        await reachable(client, "demo")
        stopped = await client.vms.apply_and_wait("demo", "stop", ["stopped"], grace_s=60)
        assert stopped.outcome == "met"
        assert "grace_over" not in str((await client.vms.inspect("demo"))["actor"])
