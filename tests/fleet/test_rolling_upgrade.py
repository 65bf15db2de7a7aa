"""An upgrade of a fleet, one host after the other, as the how-to has it: VMs run on where they are, and any other host
answers meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, fleet
from tests.fleet.test_hosts import create, output_of, until
from tests.system.test_upgrade import begin_with, previous

pytestmark = [
    pytest.mark.system,
    needs_etcd,
    pytest.mark.skipif(os.getuid() != 0, reason="freezes processes as root"),
]
__all__ = ["previous"]

HOSTS = ("h1", "h2", "h3")


async def test_hosts_of_two_versions_are_one_fleet(tmp_path: Path, previous: Path) -> None:
    with fleet(tmp_path, "h1", "h2", late=("h1",), flags=NO_BOOT) as found:
        begin_with(found["h1"].daemon, previous)
        found["h1"].daemon.start()
        await found.cluster.ready()
        await found.up()
        async with found["h2"].http() as new:
            async with found["h1"].http() as old:
                for http, name, host in ((old, "vm1", "h2"), (new, "vm2", "h1")):
                    vm = {"name": name, "memory_mb": 128}
                    made = await http.post("/api/v1/vms", json=vm, headers={"Volant-Host": host})
                    assert (made.status_code, made.headers["Volant-Host"]) == (201, host), made.text
                assert (await old.post("/api/v1/networks", json={"name": "net1"})).status_code == 201
                assert (await new.post("/api/v1/networks", json={"name": "net2"})).status_code == 201
                for http in (old, new):
                    await until(http, "/api/v1/vms", lambda answer: named(answer) == ["vm1", "vm2"])
                    await until(http, "/api/v1/networks", lambda answer: {"net1", "net2"} <= set(named(answer)))
            assert found["h1"].daemon.stop() == 0
            begin_with(found["h1"].daemon, None)
            found["h1"].daemon.start()
            await found.up()
            async with found["h1"].http() as upgraded:
                for http in (upgraded, new):
                    await until(http, "/api/v1/vms", lambda answer: named(answer) == ["vm1", "vm2"])
                assert {"net1", "net2"} <= set(named(await upgraded.get("/api/v1/networks")))
                for name in ("vm1", "vm2"):
                    assert (await upgraded.delete(f"/api/v1/vms/{name}")).status_code == 204


def named(answer: httpx.Response) -> list[str]:
    """Returns the names in a list; of those that only some hosts answer for, none."""
    if answer.status_code != 200 or "Volant-Missing-Hosts" in answer.headers:
        return []
    return sorted(each["name"] for each in answer.json())


@pytest.mark.full
async def test_vms_run_on_while_their_hosts_are_upgraded_one_by_one(
    tmp_path: Path, previous: Path, image_cache: Path
) -> None:
    if not (previous / "volant/fleet").is_dir():
        pytest.skip("the previous version knew no fleets")
    with fleet(tmp_path, *HOSTS, late=HOSTS) as found:
        for host in found.hosts:
            begin_with(host.daemon, previous)
            host.daemon.start()
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as http:
            before = {}
            for name in HOSTS:
                more = {"failover": "restart"} if name == "h2" else {}
                made = await create(http, f"on-{name}", name, boot="cold", **more)
                assert made.status_code == 201, made.text
                before[name] = made.json()
        for name in HOSTS:
            host, other = found[name], found["h2" if name == "h1" else "h1"]
            assert host.daemon.stop() == 0
            async with other.http() as http:
                for there in set(HOSTS) - {name}:
                    done = await http.post(f"/api/v1/vms/on-{there}/agent/v1/exec", json={"command": ["hostname"]})
                    assert output_of(done) == f"on-{there}\n".encode(), done.text
                # What h2 has is started elsewhere, if it is away for much longer than its sign of life lasts.
                if name != "h2":
                    await create_elsewhere(http, name)
            begin_with(host.daemon, None)
            host.daemon.start()
            await found.up()
            async with other.http() as http:
                shown = await until(
                    http,
                    f"/api/v1/vms/on-{name}",
                    lambda answer: answer.status_code == 200 and answer.json()["unreachable"] is None,
                )
                after = shown.json()
                for same in ("id", "pid", "boots", "status", "failover", "move"):
                    assert after[same] == before[name][same], (name, same)
                done = await http.post(f"/api/v1/vms/on-{name}/agent/v1/exec", json={"command": ["hostname"]})
                assert output_of(done) == f"on-{name}\n".encode(), done.text


async def create_elsewhere(http: httpx.AsyncClient, away: str) -> None:
    """Creates a VM and deletes it, while a host is away: it goes to another one, once the sign of life is over."""
    with trio.fail_after(30):
        while (made := await create(http, f"during-{away}")).status_code == 503:  # noqa: ASYNC110
            await trio.sleep(0.2)
    assert (made.status_code, made.headers["Volant-Host"] == away) == (201, False), made.text
    assert (await http.delete(f"/api/v1/vms/during-{away}", timeout=60)).status_code == 204
