"""A committed request whose answer was lost with the daemon is answered by the next daemon, and executed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, event_of
from volant.client import Client, Waited

BODY = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
KEY = {"Idempotency-Key": "one-vm"}
CREATE = f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s"


def again(daemon: Daemon) -> None:
    """Kills the daemon and starts the next one."""
    daemon.kill()
    daemon.start()


async def test_a_request_interrupted_by_kill_9_is_answered_and_executed_once(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    # On a Unix socket, so that the next daemon has the same address.
    address = f"unix:{tmp_path}/api.sock"
    daemon = make_daemon("--listen", f"127.0.0.1:0,{address}", ephemeral=False)
    async with Client(address) as client:
        async with client.events() as events, trio.open_nursery() as nursery:

            async def cut_off() -> None:
                async with daemon.http() as http:
                    with pytest.raises(httpx.TransportError):
                        await http.post(CREATE, json=BODY, headers=KEY)

            nursery.start_soon(cut_off)
            created = await event_of(events, "VM_CREATED", "demo")
            await trio.to_thread.run_sync(again, daemon)
        async with daemon.http() as http:
            for _ in range(2):
                answer = await http.post(CREATE, json=BODY, headers=KEY, timeout=2 * BOOT_S)
                assert (answer.status_code, answer.headers["volant-wait"]) == (201, "met"), answer.text
                assert (answer.headers["location"], answer.headers["idempotency-replayed"]) == (
                    "/api/v1/vms/demo",
                    "true",
                )
                assert (answer.json()["id"], answer.json()["boots"]) == (created.vm_id, 1)
            assert [vm["id"] for vm in (await http.get("/api/v1/vms")).json()] == [created.vm_id]
        assert len(daemon.hypervisors()) == 1

        # The client retries by itself.
        async with client.events() as events, trio.open_nursery() as nursery:
            outcome: list[Waited] = []

            async def restart() -> None:
                outcome.append(await client.vms.apply_and_wait("demo", "restart", ["running"], timeout_s=2 * BOOT_S))

            nursery.start_soon(restart)
            await event_of(events, "VM_STOPPING", "demo")
            await trio.to_thread.run_sync(again, daemon)
        (waited,) = outcome
        assert waited.outcome == "met"
        assert waited.vm is not None
        assert (waited.vm.id, waited.vm.boots) == (created.vm_id, 2)
