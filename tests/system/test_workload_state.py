"""A workload that cannot start is visible in its VM's state, and `--wait` fails."""

from __future__ import annotations

import subprocess
import sys

import trio

from tests.system.kit import BOOT_S, REPOSITORY, Daemon, spec

ENDS = {"name": "ends", "workload": {"entrypoint": ["sh", "-c", "exit 3"], "restart": "never"}}
MANIFEST = {"name": "broken", "workload": {"entrypoint": ["nosuch"]}}
WHY = "there is no program nosuch"


def volar(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "volant.cli.main", "--api", daemon.base_url, *words]
    environ = {**daemon.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environ, text=True, capture_output=True, check=False, timeout=BOOT_S
    )


async def test_a_workload_that_cannot_start_is_reported_everywhere(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.plugins.install(MANIFEST)

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


async def test_a_workload_that_ends_with_an_error_is_reported_too(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.plugins.install(ENDS)
        # It did start, so the VM may have been ready for a moment.
        await client.vms.create_and_wait(spec("demo", plugin="ends"), ["ready"], timeout_s=BOOT_S)
        with trio.fail_after(BOOT_S):
            while (found := (await client.vms.get("demo")).workload) is None or found.state != "failed":  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert (found.exit_code, found.error) == (3, "it ended with exit code 3")
        await client.vms.delete("demo")
        await client.plugins.delete("ends")
