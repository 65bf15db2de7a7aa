"""Snapshots and volumes of a fleet: any host finds them, names are unique, and VMs are made where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import fleet, message, tool

pytestmark = [pytest.mark.system, needs_etcd]

ON_H1, ON_H2 = {"Volant-Host": "h1"}, {"Volant-Host": "h2"}


@pytest.mark.full
async def test_snapshots_and_volumes_are_found_from_any_host(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1, found["h2"].http() as h2:
            made = await h1.post("/api/v1/volumes", json={"name": "data", "size_mb": 32}, headers=ON_H2)
            assert (made.status_code, made.headers["Volant-Host"]) == (201, "h2"), made.text
            for http in (h1, h2):
                shown = await http.get("/api/v1/volumes/data")
                assert (shown.status_code, shown.headers["Volant-Host"]) == (200, "h2")
            again = await h1.post("/api/v1/volumes", json={"name": "data", "size_mb": 32}, headers=ON_H1)
            assert (again.status_code, again.json()["type"]) == (409, "urn:volant:error:volume-exists")
            copy = await h1.post("/api/v1/volumes/data/clone", json={"name": "copy"})
            assert (copy.status_code, copy.headers["Volant-Host"]) == (201, "h2"), copy.text

            # A VM is made where its volumes are, and continues where its snapshot is.
            body = {"name": "web", "memory_mb": 128, "volumes": ["data:/data:ro"]}
            vm = await h1.post("/api/v1/vms?wait=running", json=body)
            assert (vm.status_code, vm.headers["Volant-Host"], vm.json()["status"]) == (201, "h2", "running"), vm.text
            # Models work in it from any host, and so do clients that follow its boots.
            ran = await tool(h1, "vms_exec", vm="web", command=["cat", "/proc/sys/kernel/hostname"])
            assert (ran["exit_code"], ran["stdout"]) == (0, "web\n")
            content = (await message(h1, "resources/read", {"uri": "volant://vms/web"}))["contents"][0]
            assert json.loads(content["text"])["id"] == vm.json()["id"]
            command = {"command": "volant.vms.get", "params": {"name": "web"}}
            assert (await h1.post("/api/v1/mcp", json=command)).json()["result"]["id"] == vm.json()["id"]
            assert "web" in await tool(h1, "vms_create", name="web")
            run = {"threadId": "t", "runId": "r", "messages": []}
            boot = await h1.post("/api/v1/agui?vm=web&duration=200ms", json=run)
            assert [json.loads(line[6:])["type"] for line in boot.text.split("\n\n")[:2]] == [
                "RUN_STARTED",
                "STATE_SNAPSHOT",
            ]
            other = await h1.post("/api/v1/volumes", json={"name": "other", "size_mb": 32}, headers=ON_H1)
            assert other.status_code == 201, other.text
            split = await h1.post("/api/v1/vms", json={"name": "no", "volumes": ["data:/a:ro", "other:/b"]})
            assert (split.status_code, split.json()["type"]) == (409, "urn:volant:error:on-several-hosts")
            taken = await h1.post("/api/v1/vms/web/snapshots", json={"name": "then"})
            assert (taken.status_code, taken.headers["Volant-Host"]) == (201, "h2"), taken.text
            unnamed = await h1.post("/api/v1/vms/web/snapshots", json={})
            assert (unnamed.status_code, (await h1.get(unnamed.headers["Location"])).status_code) == (201, 200)
            restored = await h1.post("/api/v1/vms", json={"name": "two", "from_snapshot": "then"})
            assert (restored.status_code, restored.headers["Volant-Host"]) == (201, "h2"), restored.text

            for path in ("vms/two", "vms/web", "snapshots/then", unnamed.headers["Location"][8:], "volumes/data"):
                assert (await h1.delete(f"/api/v1/{path}")).status_code == 204, path
            # The name is free at once, for any host.
            again = await h2.post("/api/v1/volumes", json={"name": "data", "size_mb": 32}, headers=ON_H1)
            assert (again.status_code, again.headers["Volant-Host"]) == (201, "h1"), again.text
            for name in ("data", "copy", "other"):
                assert (await h2.delete(f"/api/v1/volumes/{name}")).status_code == 204
