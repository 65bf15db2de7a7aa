"""A real guest's workload runs as its user, ends as it should, also with its agent, and says why it failed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress

import httpx
import pytest
import trio

from tests.system.kit import BOOT_S, REPOSITORY, Daemon, boot, next_event, reachable, run, spec, until
from volant.client import ClientError, LogLine

WHO = 'echo "$(id -u) $(id -g) $HOME $(pwd) $A"; echo again > /dev/stdout'
JOB = {
    "name": "job",
    "workload": {
        "entrypoint": ["sh", "-c", WHO],
        "env": {"A": "job"},
        "user": "1234:5",
        "workdir": "/srv/made/here",
        "restart": "never",
        "on_exit": "stop",
    },
}
STOPS = {
    "name": "stops",
    "workload": {
        "entrypoint": [
            "sh", "-c", "trap 'echo term' TERM; trap 'echo quit; exit 0' QUIT; echo up; while :; do sleep 0.1; done",
        ],
        "stop_signal": "SIGQUIT",
        "on_exit": "stop",
    },
    "exec": {"env": {"B": "exec"}, "user": "1234", "workdir": "/srv/exec"},
}  # fmt: skip
BROKEN = {"name": "broken", "workload": {"entrypoint": ["nosuch"]}}
WHY = "there is no program nosuch"

TALKER = """
import os, sys, time
print("begins", os.environ["COLOUR"], flush=True)
time.sleep(10000)
"""
# The oldest Python process except PID 1.
KILL = "kill -9 $(pidof python3.13 | tr ' ' '\\n' | sort -n | grep -vx 1 | head -n 1); sleep 60"


def lines(daemon: Daemon, name: str) -> list[str]:
    """Returns what the workload of a VM has printed."""
    answer = httpx.get(f"{daemon.base_url}/api/v1/vms/{name}/logs?stream=stdout,stderr", timeout=60)
    return [entry["line"] for entry in map(json.loads, answer.text.splitlines())]


@pytest.mark.parametrize("how", ["cold", "auto"])
async def test_a_job_runs_as_its_user_and_its_vm_stops(daemon: Daemon, how: str) -> None:
    async with daemon.client() as client, client.events(vm="demo") as feed:
        await client.plugins.install(JOB)
        created = await client.vms.create_and_wait(spec("demo", plugin="job", boot=how), ["ready"], timeout_s=BOOT_S)
        assert created.outcome == "met", created
        vm = await until(client, "demo", "stopped")
        assert vm is not None
        assert vm.reason is not None
        assert (vm.desired, vm.reason.code) == ("stopped", "workload_exited")
        assert vm.workload is not None
        assert (vm.workload.state, vm.workload.exit_code, vm.workload.pid) == ("exited", 0, None)
        assert lines(daemon, "demo") == ["1234 5 / /srv/made/here job", "again"]
        kinds = [(await next_event(feed)).type for _ in range(8)]
        assert kinds[3:] == ["WORKLOAD_STARTED", "WORKLOAD_READY", "WORKLOAD_EXITED", "VM_STOPPING", "VM_STOPPED"]
        late = await client.vms.wait("demo", ["ready"], timeout_s=5)
        assert late.outcome == "met"
        await client.vms.delete("demo")
        await client.plugins.delete("job")


async def test_a_workload_gets_its_stop_signal_and_no_other(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.plugins.install(STOPS)
        await boot(client, "demo", plugin="stops", env={"C": "own"})
        with trio.fail_after(BOOT_S):
            while "up" not in await trio.to_thread.run_sync(lines, daemon, "demo"):  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert await run(client, "demo", "sh", "-c", 'echo "$(id -u) $(pwd) $B $C"') == "1234 /srv/exec exec own\n"
        # A reboot by the guest ends the workload too, and is still a reboot.
        async with client.events(vm="demo") as feed:
            with suppress(ClientError):
                async with client.vms.exec("demo", ["sh", "-c", "reboot; sleep 60"], user="root") as process:
                    async for _ in process:
                        pass
            kinds = [(await next_event(feed)).type for _ in range(4)]
            assert kinds == ["VM_STOPPING", "VM_STOPPED", "VM_STARTING", "VM_RUNNING"]
        with trio.fail_after(BOOT_S):
            while (await trio.to_thread.run_sync(lines, daemon, "demo")).count("up") < 2:  # noqa: ASYNC110
                await trio.sleep(0.1)
        await client.vms.stop("demo")
        stopped = await until(client, "demo", "stopped")
        assert stopped is not None
        assert (stopped.reason, stopped.workload) == (None, None)
        assert lines(daemon, "demo") == ["up", "quit", "up", "quit"]
        await client.vms.delete("demo")
        await client.plugins.delete("stops")


def volar(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "volant.cli.main", "--api", daemon.base_url, *words]
    environ = {**daemon.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environ, text=True, capture_output=True, check=False, timeout=BOOT_S
    )


async def test_a_workload_that_cannot_start_is_reported_everywhere(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.plugins.install(BROKEN)

        async def tell(*words: str) -> subprocess.CompletedProcess[str]:
            return await trio.to_thread.run_sync(volar, daemon, *words)

        made = await tell("vms", "create", "demo", "--plugin", "broken", "--ttl", "1h", "--wait")
        assert made.returncode == 1, made
        assert f"its workload has failed: {WHY}" in made.stderr
        assert WHY in (await tell("vms", "get", "demo")).stdout
        assert "expires" in (await tell("vms", "get", "demo")).stdout
        assert "workload_failed" in (await tell("vms", "list")).stdout
        wide = (await tell("vms", "list", "--wide")).stdout
        assert WHY in wide
        assert "EXPIRES" in wide
        assert f"volant: the workload has failed: {WHY}" in (await tell("vms", "logs", "demo")).stdout
        inspected = (await client.vms.inspect("demo"))["vm"]
        found = inspected["workload"]
        assert (found["state"], found["exit_code"], found["error"]) == ("failed", None, WHY)
        assert inspected["expires_at"] is not None
        waited = await client.vms.wait("demo", ["ready"], timeout_s=BOOT_S)
        assert (waited.outcome, waited.vm and waited.vm.status) == ("failed", "running")
        await client.vms.delete("demo")
        await client.plugins.delete("broken")


async def test_a_killed_agent_comes_back_with_its_workload(daemon: Daemon) -> None:
    async with daemon.client() as client:
        workload = {"entrypoint": ["python3.13", "-c", TALKER], "env": {"COLOUR": "red"}}
        await client.plugins.install({"name": "talker", "version": "1", "workload": workload})
        waited = await client.vms.create_and_wait(spec("demo", plugin="talker", env={"COLOUR": "blue"}))
        assert waited.outcome == "met"
        newest = await client.newest_event()
        async with client.vms.logs("demo", since=0, streams=["stdout"]) as log:
            for _ in range(2):
                with trio.fail_after(30):
                    line = await log.receive()
                assert isinstance(line, LogLine)
                assert line.line == "begins blue"
                try:
                    await run(client, "demo", "sh", "-c", KILL)
                except (ClientError, AssertionError) as error:
                    print(f"as it should: {error}")
            with trio.fail_after(30):
                line = await log.receive()
            assert isinstance(line, LogLine)
            assert line.line == "begins blue"
            await reachable(client, "demo")
            health = (await client.vms.agent_health("demo"))["workload"]
            assert health["state"] == "healthy"
        async with client.events(after=newest, vm="demo") as feed:
            # The workload was started again. The VM did not change.
            while True:
                event = await next_event(feed)
                assert event.type.startswith("WORKLOAD_"), event
                assert event.workload is not None
                if event.type == "WORKLOAD_STARTED" and event.workload.pid == health["pid"]:
                    break
