"""A VM whose host is gone goes on elsewhere, and never on two hosts: real daemons, guests and an etcd."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import READY_S, TTL_S, fleet
from tests.fleet.test_hosts import create, output_of, until
from volant.host._cgroups import group_of, is_frozen

pytestmark = [
    pytest.mark.system,
    needs_etcd,
    pytest.mark.skipif(os.getuid() != 0, reason="freezes processes as root"),
]


async def movable(http: httpx.AsyncClient, name: str, host: str, **more: Any) -> dict[str, Any]:
    with trio.fail_after(READY_S):
        # A host that has just joined may not hold VMs back yet.
        while True:
            made = await create(http, name, host, failover="restart", boot="cold", **more)
            if made.status_code != 503:
                break
            await trio.sleep(0.1)
    assert made.status_code == 201, made.text
    shown: dict[str, Any] = made.json()
    assert (shown["status"], shown["failover"], shown["move"]) == ("running", "restart", None)
    return shown


async def command(http: httpx.AsyncClient, name: str, *words: str) -> bytes:
    with trio.fail_after(30):
        # A daemon that has just started or a VM that has just been resumed has no channel yet.
        while (  # noqa: ASYNC110 - of another process
            done := await http.post(f"/api/v1/vms/{name}/agent/v1/exec", json={"command": words}, timeout=30)
        ).status_code == 502:
            await trio.sleep(0.1)
    assert done.status_code == 200, done.text
    return output_of(done)


def work_of(pid: int) -> int:
    """Returns how long the processors of a VM have run, in nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


async def frozen(pid: int) -> int:
    """Waits until a VM is frozen; returns how long its processors have run, in nanoseconds."""
    group = group_of(pid)
    assert group is not None
    with trio.fail_after(30):
        while not is_frozen(group):  # noqa: ASYNC110 - of another process
            await trio.sleep(0.05)
        # The last thread still runs for a moment after the kernel has said so.
        before, done = -1, work_of(pid)
        while done != before:
            await trio.sleep(0.05)
            before, done = done, work_of(pid)
    return done


async def gone(pid: int) -> None:
    with trio.fail_after(30):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110,ASYNC240 - not a child
            await trio.sleep(0.1)


async def said(http: httpx.AsyncClient, text: str) -> bool:
    """Waits until an event of the fleet says so."""
    found = False
    with trio.move_on_after(30) as scope:
        async with http.stream("GET", "/api/v1/events/vms?since=0&types=VM_CREATED") as answer:
            async for line in answer.aiter_lines():
                if text in line:
                    found = True
                    # To leave the loop would leave its generators to the garbage collector.
                    scope.cancel()
    return found


async def test_a_vm_goes_on_elsewhere_when_its_host_is_gone(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1:
            before = await movable(h1, "web", "h2", env={"A": "b"}, labels={"team": "a"}, ttl="1h")
            kept = {"failover": "restore", "replicate": {"every": "10s"}, "boot": "cold"}
            assert (await create(h1, "kept", "h2", **kept)).status_code == 201
            await command(h1, "kept", "sh", "-c", "echo in memory >/run/word")
            written = datetime.now(UTC).isoformat()
            never = (await create(h1, "stays", "h2", boot="cold")).json()
            assert await command(h1, "web", "sh", "-c", "touch /run/before; hostname") == b"web\n"
            made = await replica(h1, "kept", lambda made: (made["at"] or "") > written)
            assert (made["hosts"], made["reason"]) == (["h1"], None)
            assert (await h1.get("/api/v1/snapshots")).json() == []
            # Its VMs go on without it, so the watchdog has to act.
            found["h2"].daemon.kill()
            shown = await until(
                h1, "/api/v1/vms/web", lambda answer: answer.status_code == 200 and answer.json()["move"] is not None
            )
            done = await frozen(before["pid"])
            after = shown.json()
            assert shown.headers["Volant-Host"] == "h1"
            assert (after["move"]["from_host"], after["move"]["to_host"]) == ("h2", "h1")
            assert (after["labels"], after["expires_at"]) == ({"team": "a"}, before["expires_at"])
            assert after["id"] != before["id"]
            await until(h1, "/api/v1/vms/web", lambda answer: answer.json()["status"] == "running")
            assert await command(h1, "web", "sh", "-c", "cat /run/before 2>/dev/null; hostname") == b"web\n"
            assert work_of(before["pid"]) == done, "it runs on both hosts"
            assert await said(h1, "h1 has taken it over from h2, which gives no sign of life")
            answer = await until(h1, "/api/v1/vms/kept", lambda answer: answer.json().get("status") == "running")
            after = answer.json()
            assert (after["move"]["state"], after["move"]["from_host"], after["boots"]) == ("restored", "h2", 1)
            assert await command(h1, "kept", "cat", "/run/word") == b"in memory\n"
            assert await said(h1, "h1 continues it from its replica of ")
            # There is no other host that could have one now, and it says so.
            made = await replica(h1, "kept", lambda made: made["reason"]["code"] == "no_host")
            assert made["at"] is None
            # The other one runs on, without its daemon.
            assert work_of(never["pid"]) > 0
            assert (await h1.get("/api/v1/vms/stays")).json()["unreachable"] == "h2"

            found["h2"].daemon.start()
            await found.up()
            await gone(before["pid"])
            async with found["h2"].http() as h2:
                await until(h2, "/api/v1/vms/stays", lambda answer: answer.json().get("unreachable", "") is None)
                assert await command(h2, "stays", "hostname") == b"stays\n"
                assert await command(h2, "web", "hostname") == b"web\n"
                assert (await h2.get("/api/v1/vms/web")).headers["Volant-Host"] == "h1"
                # They come back alive when their host is drained.
                assert (await h2.post("/api/v1/hosts/h1/drain")).status_code == 200
                for name in ("web", "kept"):
                    answer = await until(
                        h2,
                        f"/api/v1/vms/{name}",
                        lambda answer: (
                            answer.headers["Volant-Host"] == "h2" and answer.json().get("status") == "running"
                        ),
                    )
                    after = answer.json()
                    assert (after["move"]["from_host"], after["move"]["state"]) == ("h1", "moved")
                assert await command(h2, "kept", "cat", "/run/word") == b"in memory\n"
                assert await command(h2, "web", "hostname") == b"web\n"
                assert (await h2.delete("/api/v1/vms/web")).status_code == 204
                assert (await h2.get("/api/v1/vms/web")).status_code == 404
                assert (await h2.delete("/api/v1/vms/kept")).status_code == 204


async def replica(http: httpx.AsyncClient, name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Waits until the newest replica of a VM is as wanted."""
    answer = await until(http, f"/api/v1/vms/{name}", lambda answer: holds(answer.json()["replica"]))
    found: dict[str, Any] = answer.json()["replica"]
    return found


@pytest.mark.full
async def test_a_host_that_does_not_reach_etcd_pauses_its_movable_vms(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1:
            vm = await movable(h1, "web", "h1")
            (member,) = found.cluster.members
            member.send(signal.SIGSTOP)
            try:
                refused = await until(h1, "/api/v1/fleet", lambda answer: answer.json()["etcd"] == "unreachable")
                assert refused.json()["fence"] in ("open", "closed")
                await until(h1, "/api/v1/fleet", lambda answer: answer.json()["fence"] == "closed")
                done = await frozen(vm["pid"])
                shown = (await h1.get("/api/v1/vms/web")).json()
                assert (shown["status"], shown["pid"]) == ("running", vm["pid"])
                another = await create(h1, "other", failover="restart")
                assert (another.status_code, another.json()["type"]) == (503, "urn:volant:error:fleet-unavailable")
                assert work_of(vm["pid"]) == done
                # A daemon that starts anew waits, too.
                found["h1"].daemon.kill()
                found["h1"].daemon.start()
            finally:
                member.send(signal.SIGCONT)
        async with found["h1"].http() as h1:
            await until(h1, "/api/v1/fleet", lambda answer: answer.json().get("fence") == "open")
            assert await command(h1, "web", "hostname") == b"web\n"
            shown = (await h1.get("/api/v1/vms/web")).json()
            assert (shown["status"], shown["pid"], shown["boots"]) == ("running", vm["pid"], 1)
            # One that is restarted in time stops nothing.
            found["h1"].daemon.kill()
            found["h1"].daemon.start()
        async with found["h1"].http() as h1:
            assert await command(h1, "web", "hostname") == b"web\n"
            left = await h1.post("/api/v1/fleet/leave?keep_vms=true")
            assert left.status_code == 204, left.text
            done = work_of(vm["pid"])
            await trio.sleep(TTL_S)
            assert work_of(vm["pid"]) > done, "its time has run out, and it goes on as this host's alone"
            shown = (await h1.get("/api/v1/vms/web")).json()
            assert (shown["failover"], shown["pid"]) == ("never", vm["pid"])
            assert (await h1.delete("/api/v1/vms/web")).status_code == 204
