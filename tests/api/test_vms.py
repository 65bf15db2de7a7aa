"""VMs, plugins and the system over HTTP, as the contract says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from tests.api.kit import Api, read_answer, request
from tests.names import named

VM_FIELDS = {
    "id", "name", "status", "desired", "reason", "plugin", "runtime", "pid", "ip_address", "mac_address", "cpu_cores",
    "memory_mb", "kernel_cmdline", "serial_socket", "labels", "hypervisor", "accelerator", "restart_policy",
    "restarts", "boots", "boot", "booted_from", "fallback", "origin", "disk", "created_at", "updated_at", "started_at",
    "disk_mb", "network", "network_reason", "ports", "secrets", "image", "workload", "expires_at", "warnings",
    "failover", "replicate", "replica", "move", "placement", "unreachable", "egress", "volumes", "disk_iops",
    "disk_mbps", "project",
}  # fmt: skip


async def test_a_vm_is_created_shown_and_deleted(served: Api) -> None:
    answer = await served.client.post(
        "/api/v1/vms?wait=crashed,running",
        json={"name": "demo", "cpu_cores": 1, "memory_mb": 128, "labels": {"team": "a"}},
    )
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/vms/demo")
    assert answer.headers["volant-wait"] == "met"
    vm = answer.json()
    assert set(vm) == VM_FIELDS
    assert (vm["name"], vm["status"], vm["disk"], vm["ip_address"]) == ("demo", "crashed", "none", "")
    assert vm["reason"]["code"]
    assert vm["created_at"].endswith("Z")
    again = await served.client.get("/api/v1/vms/demo")
    assert again.json()["id"] == vm["id"]
    assert (await served.client.get("/api/v1/vms/demo/inspect")).json()["vm"]["name"] == "demo"
    assert (await served.client.get("/api/v1/stats/vms")).json() == [], "it has no process"
    assert (await served.client.get("/api/v1/vms/demo/memory")).json()["type"].endswith("vm-not-running")
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    assert (await served.client.get("/api/v1/vms/demo")).status_code == 404
    assert (await served.create("demo"))["id"] > vm["id"]


async def test_a_name_is_taken_once(served: Api) -> None:
    await served.create("demo")
    answer = await served.client.post("/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128})
    assert answer.status_code == 409
    answer = await served.client.post(
        "/api/v1/vms", json={"name": "other", "cpu_cores": 1, "memory_mb": 128, "plugin": "none"}
    )
    assert answer.status_code == 404


async def test_the_list_is_filtered_and_paged(served: Api) -> None:
    for number in range(5):
        await served.crashed(f"vm{number}", labels={"n": str(number), "even": str(number % 2 == 0).lower()})

    async def names(query: str) -> list[str]:
        return [vm["name"] for vm in (await served.client.get(f"/api/v1/vms{query}")).json()]

    assert await names("") == ["vm0", "vm1", "vm2", "vm3", "vm4"]
    assert await names("?status=crashed&label=even=true") == ["vm0", "vm2", "vm4"]
    assert await names("?label=even=true&label=n=2") == ["vm2"]
    assert await names("?status=running,starting") == []
    assert await names("?plugin=other") == []
    page = await served.client.get("/api/v1/vms?limit=2&label=even=true")
    assert [vm["name"] for vm in page.json()] == ["vm0", "vm2"]
    following = page.links["next"]["url"]
    last = await served.client.get(following)
    assert [vm["name"] for vm in last.json()] == ["vm4"]
    assert "link" not in last.headers


async def test_the_list_has_the_id_of_its_last_event(served: Api) -> None:
    before = (await served.client.get("/api/v1/vms")).headers["volant-event-id"]
    await served.crashed("demo")
    after = (await served.client.get("/api/v1/vms")).headers["volant-event-id"]
    assert before.rpartition("-")[0] == after.rpartition("-")[0]
    assert int(after.rpartition("-")[2]) - int(before.rpartition("-")[2]) >= 3


async def test_commands_answer_with_the_vm(served: Api) -> None:
    await served.crashed("demo")
    answer = await served.client.post("/api/v1/vms/demo/start?wait=crashed&timeout=10s")
    assert (answer.status_code, answer.headers["volant-wait"]) == (200, "met")
    answer = await served.client.post("/api/v1/vms/demo/stop?grace=0s")
    assert answer.json()["desired"] == "stopped"
    answer = await served.client.get("/api/v1/vms/demo?wait=stopped")
    assert (answer.json()["status"], answer.headers["volant-wait"]) == ("stopped", "met")
    assert (await served.client.post("/api/v1/vms/demo/recover")).status_code == 409
    for command in ("pause", "resume"):
        answer = await served.client.post(f"/api/v1/vms/demo/{command}")
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:vm-not-running")
        assert "is stopped" in answer.json()["detail"]
        assert "start" in answer.json()["hint"]
    answer = await served.client.post("/api/v1/vms/demo/restart?wait=running")
    assert (answer.headers["volant-wait"], answer.json()["status"]) == ("failed", "crashed")


async def test_waiting_ends_in_time(served: Api) -> None:
    await served.crashed("demo")
    await served.client.post("/api/v1/vms/demo/stop?wait=stopped")
    answer = await served.client.get("/api/v1/vms/demo?wait=running&timeout=100ms")
    assert answer.headers["volant-wait"] in ("failed", "timeout")


async def test_an_etag_changes_with_the_vm(served: Api) -> None:
    await served.crashed("demo")
    tag = (await served.client.get("/api/v1/vms/demo")).headers["etag"]
    same = await served.client.get("/api/v1/vms/demo", headers={"if-none-match": tag})
    assert (same.status_code, same.content) == (304, b"")
    answer = await served.client.post("/api/v1/vms/demo/stop", headers={"if-match": tag})
    assert answer.status_code == 200
    assert answer.headers["etag"] != tag
    for method, path in (("POST", "/api/v1/vms/demo/start"), ("DELETE", "/api/v1/vms/demo")):
        stale = await served.client.request(method, path, headers={"if-match": tag})
        assert stale.status_code == 412
    assert (await served.client.delete("/api/v1/vms/demo", headers={"if-match": "*"})).status_code == 204


async def test_of_clients_with_the_same_etag_one_changes_the_vm(served: Api) -> None:
    await served.crashed("demo")
    await served.client.post("/api/v1/vms/demo/stop?wait=stopped")
    answer = await served.client.get("/api/v1/vms/demo")
    statuses: list[int] = []

    async def restart() -> None:
        given = await served.client.post("/api/v1/vms/demo/restart", headers={"if-match": answer.headers["etag"]})
        statuses.append(given.status_code)
        if given.status_code == 412:
            assert given.json()["vm"] == "demo"

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(restart)
    assert sorted(statuses) == [200] + 7 * [412]
    row = served.deps.store.projection.get(named("demo"))
    assert row is not None
    assert row.generation == 2


async def test_if_match_means_the_vm_and_not_its_name(served: Api) -> None:
    await served.crashed("demo")
    await served.client.delete("/api/v1/vms/demo")
    await served.crashed("demo")
    row = served.deps.store.projection.get(named("demo"))
    assert row is not None
    for tag in (f'"{row.id - 1}-{row.revision}"', f'W/"{row.id}-{row.revision}"', '"x"', f'"{row.id}-{10**30}"'):
        answer = await served.client.delete("/api/v1/vms/demo", headers={"if-match": tag})
        assert (answer.status_code, answer.json()["vm"]) == (412, "demo")
    listed = [("if-match", '"x"'), ("if-match", f'"y", "{row.id}-{row.revision}"')]
    assert (await served.client.delete("/api/v1/vms/demo", headers=listed)).status_code == 204


async def test_an_empty_if_match_is_no_precondition_and_not_none_either(served: Api) -> None:
    await served.crashed("demo")
    for empty in ("", ", ,"):
        answer = await served.client.delete("/api/v1/vms/demo", headers={"if-match": empty})
        assert (answer.status_code, answer.json()["field"]) == (400, "If-Match")
    assert (await served.client.get("/api/v1/vms/demo")).status_code == 200


async def test_waits_end_when_the_daemon_stops(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = trio.Event()

    async def for_ever(*_: object, **__: object) -> None:
        gate.set()
        await trio.sleep_forever()

    await served.crashed("demo")
    monkeypatch.setattr(served.deps.vms, "wait", for_ever)
    monkeypatch.setattr(served.deps.vms, "delete", for_ever)
    async with await served.server.connect() as waiting, await served.server.connect() as deleting:
        for stream, asked in (
            (waiting, request("GET", "/api/v1/vms/demo?wait=running")),
            (deleting, request("DELETE", "/api/v1/vms/demo")),
        ):
            gate = trio.Event()
            await stream.send_all(asked)
            with trio.fail_after(20):
                await gate.wait()
        served.server.stopping.set()
        answer = await read_answer(waiting)
        assert (answer.status, answer.headers["volant-wait"]) == (200, "timeout")
        assert (await read_answer(deleting)).status == 503


async def test_plugins_are_installed_and_removed(served: Api) -> None:
    manifest = {
        "name": "web",
        "version": "1.2",
        "resources": {"memory_mb": 192},
        "workload": {"entrypoint": ["/bin/httpd"], "port": 8080},
    }
    answer = await served.client.post("/api/v1/plugins", json=manifest)
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/plugins/web")
    assert (await served.client.post("/api/v1/plugins", json=manifest)).status_code == 409
    assert {plugin["name"] for plugin in (await served.client.get("/api/v1/plugins")).json()} == {"base", "web"}
    shown = (await served.client.get("/api/v1/plugins/web/manifest")).json()
    assert shown["workload"] == {"entrypoint": ["/bin/httpd"], "port": 8080}
    answer = await served.client.post("/api/v1/plugins/web/enabled", json={"enabled": False})
    assert answer.json()["enabled"] is False
    vm = {"name": "demo", "cpu_cores": 1, "memory_mb": 192, "plugin": "web"}
    assert (await served.client.post("/api/v1/vms", json=vm)).status_code == 409
    await served.client.post("/api/v1/plugins/web/enabled", json={"enabled": True})
    assert (await served.client.post("/api/v1/vms", json={**vm, "memory_mb": 128})).json()["field"] == "memory_mb"
    assert (await served.client.post("/api/v1/vms", json=vm)).status_code == 201
    assert (await served.client.delete("/api/v1/plugins/web")).status_code == 409
    await served.client.delete("/api/v1/vms/demo")
    assert (await served.client.delete("/api/v1/plugins/web")).status_code == 204
    assert (await served.client.get("/api/v1/plugins/web")).status_code == 404


async def test_a_manifests_wrong_field_is_named(served: Api) -> None:
    for change, field in (
        ({"workload": {"entrypoint": []}}, "workload.entrypoint"),
        ({"workload": {"entrypoint": ["x"], "colour": 1}}, "workload.colour"),
        ({"workload": {}}, "workload.entrypoint"),
        ({"resources": {"memory_mb": 1}}, "resources.memory_mb"),
        ({"name": "A"}, "name"),
    ):
        answer = await served.client.post("/api/v1/plugins", json={"name": "web", **change})
        assert (answer.status_code, answer.json()["field"]) == (400, field)
    answer = await served.client.post("/api/v1/plugins/base/enabled", json={"enabled": "yes"})
    assert answer.json()["field"] == "enabled"


async def test_system_routes_describe_the_daemon(served: Api) -> None:
    await served.crashed("demo")
    status = (await served.client.get("/api/v1/system/status")).json()
    assert (status["status"], status["vm_count"], status["vms"]["crashed"], status["vms"]["running"]) == ("ok", 1, 1, 0)
    assert 0 <= status["cpu_percent"] <= 100
    assert 0 < status["mem_percent"] <= 100
    assert (await served.client.get("/api/v1/system/tree")).json()["name"] == "volantd"
    assert (await served.client.get("/api/v1/system/info")).status_code == 200


async def test_healthz_reports_whether_the_tree_is_whole(served: Api) -> None:
    assert (await served.client.get("/healthz")).json() == {"status": "ok"}
    for health in ("starting", "stopping", "degraded"):
        served.system.now = health
        answer = await served.client.get("/healthz")
        assert (answer.status_code, answer.json()) == (503, {"status": health})
        assert answer.headers["content-type"] == "application/json"


async def test_the_size_is_the_plugins_unless_it_is_given(served: Api) -> None:
    manifest = {"name": "web", "workload": {"entrypoint": ["serve"]}, "resources": {"cpu_cores": 3, "memory_mb": 300}}
    assert (await served.client.post("/api/v1/plugins", json=manifest)).status_code == 201
    for name, said, size in (
        ("a", {}, (1, 256)),
        ("b", {"cpu_cores": None, "memory_mb": 128}, (1, 128)),
        ("c", {"plugin": "web"}, (3, 300)),
        ("d", {"plugin": "web", "cpu_cores": 1}, (1, 300)),
        ("e", {"plugin": "web", "memory_mb": 512}, (3, 512)),
    ):
        answer = await served.client.post("/api/v1/vms", json={"name": name, **said})
        assert answer.status_code == 201, answer.text
        made = answer.json()
        assert (made["cpu_cores"], made["memory_mb"]) == size
    rpc = {"command": "volant.vms.create", "params": {"name": "f"}}
    made = (await served.client.post("/api/v1/mcp", json=rpc)).json()["result"]
    assert (made["cpu_cores"], made["memory_mb"]) == (1, 256)
    small = await served.client.post("/api/v1/vms", json={"name": "g", "plugin": "web", "memory_mb": 128})
    assert (small.status_code, small.json()["field"]) == (400, "memory_mb")
    assert (await served.client.post("/api/v1/vms", json={"name": "h", "plugin": "none"})).status_code == 404


async def test_a_disk_of_an_impossible_size_is_refused(served: Api, tmp_path: Path) -> None:
    """With the request, or by the first boot, which knows the size of the root filesystem."""
    (tmp_path / "disks").mkdir()
    boot = {}
    for name, size in (("kernel", 10), ("initramfs", 10), ("rootfs", 3 * 2**20 + 1)):
        sha256 = hashlib.sha256(bytes(size)).hexdigest()
        assert (await served.client.put(f"/api/v1/artifacts/{sha256}", content=bytes(size))).status_code == 201
        boot[name] = {"url": f"/{name}", "sha256": sha256}
    answer = await served.client.post("/api/v1/plugins", json={"name": "rooted", "boot": boot})
    assert answer.status_code == 201, answer.text

    bare = await served.client.post("/api/v1/vms", json={"name": "bare", "disk_mb": 64})
    assert (bare.status_code, bare.json()["field"]) == (422, "disk_mb"), bare.text
    assert "no root filesystem" in bare.json()["detail"]
    vm = {"name": "huge", "plugin": "rooted", "disk_mb": 16 * 1024 * 1024}
    huge = await served.client.post("/api/v1/vms", json=vm)
    assert (huge.status_code, "MiB are left" in huge.json()["detail"]) == (503, True), huge.text
    assert (await served.client.get("/api/v1/vms")).json() == []

    small = await served.crashed("small", plugin="rooted", disk_mb=3)
    assert small["reason"]["code"] == "disk_too_small"
    assert "disk_mb is 3, and the root filesystem alone has 4 MiB" in small["reason"]["message"]
