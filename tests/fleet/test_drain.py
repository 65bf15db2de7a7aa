"""A host that is drained: its VMs go on at another one, with what they have in memory, whatever is killed meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import READY_S, HostOfFleet, fleet
from tests.fleet.test_failover import command
from tests.fleet.test_hosts import create, until
from tests.system.rootfs import digest, make_ext4

pytestmark = [
    pytest.mark.system,
    needs_etcd,
    pytest.mark.skipif(os.getuid() != 0, reason="freezes processes as root"),
]

SLOW = ("--transfer-mbps", "40")
"""So that there is time to kill a daemon while a VM is copied."""
COUNT = "cd /run; (i=0; while :; do i=$((i + 1)); echo $i >m; mv m n; sleep 0.05; done) >/dev/null 2>&1 & echo $!"
Moves = list[dict[str, Any]]


async def counted(http: httpx.AsyncClient, name: str) -> int:
    """Returns how far a guest has counted, in its memory."""
    return int(await command(http, name, "cat", "/run/n"))


async def moves(http: httpx.AsyncClient, host: str, holds: Callable[[Moves], bool]) -> Moves:
    """Waits until the VMs of a host that is drained are as wanted."""
    path = f"/api/v1/hosts/{host}/moves"
    answer = await until(
        http,
        path,
        lambda answer: (
            answer.status_code == 200 and answer.json()["since"] is not None and holds(answer.json()["moves"])
        ),
    )
    found: Moves = answer.json()["moves"]
    return found


def is_copying(found: Moves) -> bool:
    return any(move["state"] == "copying" and move["moved_bytes"] for move in found)


async def arrived(http: httpx.AsyncClient, name: str, host: str, status: str = "running") -> dict[str, Any]:
    """Waits until a VM runs at a host, or is there with another status."""
    answer = await until(
        http,
        f"/api/v1/vms/{name}",
        lambda answer: answer.headers["Volant-Host"] == host and answer.json().get("status") == status,
    )
    shown: dict[str, Any] = answer.json()
    return shown


async def volar(host: HostOfFleet, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the command line at a host."""
    environ = {**host.daemon.environ, "VOLANT_API_BASE": host.daemon.base_url}
    command = [sys.executable, "-m", "volant.cli.main", *words]
    with trio.fail_after(READY_S):
        return await trio.run_process(command, env=environ, capture_stdout=True, capture_stderr=True, check=False)


async def with_disk(http: httpx.AsyncClient, name: str, host: str, rootfs: Path) -> None:
    """Makes a VM with a disk, writes a file, and stops it. Hosts fetch nothing: what lies below is in their cache."""
    sha256 = digest(rootfs)
    sent = await http.put(
        f"/api/v1/artifacts/{sha256}", content=await trio.Path(rootfs).read_bytes(), headers={"Volant-Host": host}
    )
    assert sent.status_code in (200, 201, 204), sent.text
    boot = {"rootfs": {"url": "https://images.example/small.ext4", "sha256": sha256}}
    assert (await http.post("/api/v1/plugins", json={"name": name, "boot": boot})).status_code == 201
    made = await create(http, name, host, plugin=name, boot="cold")
    assert made.status_code == 201, made.text
    await command(http, name, "busybox", "sh", "-c", f"echo {name} >/kept; sync")
    assert (await http.post(f"/api/v1/vms/{name}/stop?wait=stopped", timeout=READY_S)).status_code == 200


@pytest.mark.full
async def test_vms_go_on_at_another_host_whatever_is_killed(tmp_path: Path, template: Path, image_cache: Path) -> None:
    with fleet(tmp_path, "h1", "h2", template=template, flags=SLOW) as found:
        await found.cluster.ready()
        await found.up()
        async with found["h2"].http() as h2:
            made = await create(h2, "web", "h1", labels={"team": "a"}, ttl="1h")
            assert made.status_code == 201, made.text
            before = made.json()
            assert (await create(h2, "db", "h1", failover="restart")).status_code == 201
            await with_disk(h2, "off", "h1", make_ext4(tmp_path / "small.ext4", image_cache))
            pids = {name: await command(h2, name, "sh", "-c", COUNT) for name in ("web", "db")}
            numbers = {name: await counted(h2, name) for name in pids}

            # The host that they leave is killed.
            assert (await h2.post("/api/v1/hosts/h1/drain")).status_code == 200
            await moves(h2, "h1", is_copying)
            shown = (await h2.get("/api/v1/vms/web")).json()
            assert (shown["move"]["state"], shown["move"]["to_host"]) == ("moving", "h2")
            refused = await h2.post("/api/v1/vms/web/resume")
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:volant:error:vm-moving")
            found["h1"].daemon.kill()
            found["h1"].daemon.start()
            await moves(h2, "h1", lambda left: not left)
            shown = await arrived(h2, "off", "h2", "stopped")
            assert (shown["move"]["from_host"], shown["desired"], shown["reason"]) == ("h1", "stopped", None)
            for name in pids:
                shown = await arrived(h2, name, "h2")
                assert (shown["move"]["from_host"], shown["move"]["state"]) == ("h1", "moved")
                after = await counted(h2, name)
                assert after > numbers[name]
                numbers[name] = after
                assert (
                    await command(h2, name, "sh", "-c", f"kill -0 {int(pids[name])}; hostname") == f"{name}\n".encode()
                )
            shown = (await h2.get("/api/v1/vms/web")).json()
            for same in ("labels", "expires_at", "created_at", "failover"):
                assert shown[same] == before[same], same
            assert shown["id"] != before["id"]

        async with found["h1"].http() as h1:
            # And back, while the host that they come to is killed.
            assert (await h1.post("/api/v1/hosts/h1/undrain")).status_code == 200
            assert (await h1.post("/api/v1/hosts/h2/drain")).status_code == 200
            await moves(h1, "h2", is_copying)
            found["h1"].daemon.kill()
            found["h1"].daemon.start()
        async with found["h1"].http() as h1:
            await until(h1, "/api/v1/hosts/h2", lambda answer: answer.status_code == 200)
            await moves(h1, "h2", lambda left: not left)
            for name in pids:
                await arrived(h1, name, "h1")
                assert await counted(h1, name) > numbers[name]
            said = await volar(found["h1"], "hosts", "drain", "h2")
            assert (said.returncode, said.stdout) == (0, b"host h2 is draining, and has no VMs\n"), said
            # It has never been started at the other host, and its disk came back with it.
            await arrived(h1, "off", "h1", "stopped")
            started = await h1.post("/api/v1/vms/off/start?wait=running", timeout=READY_S)
            assert (started.status_code, started.json()["status"]) == (200, "running"), started.text
            assert await command(h1, "off", "cat", "/kept") == b"off\n"
            await until(h1, "/api/v1/snapshots", lambda answer: answer.json() == [])
            assert (await h1.delete("/api/v1/vms/db", timeout=READY_S)).status_code == 204
            assert (await h1.get("/api/v1/vms/db")).status_code == 404
