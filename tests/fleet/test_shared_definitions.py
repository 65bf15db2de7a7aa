"""Two real hosts and a real etcd, without guests: what is changed on one host, the other one has."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, fleet

pytestmark = [pytest.mark.programs, needs_etcd]

SOON_S = 30.0
VALUE, LATE = {"value": "x"}, {"name": "late"}


async def create(http: httpx.AsyncClient, name: str, host: str) -> httpx.Response:
    headers = {"Volant-Project": "team", "Volant-Host": host}
    return await http.post("/api/v1/vms", json={"name": name, "memory_mb": 128}, headers=headers)


async def test_all_hosts_have_what_is_changed_on_one(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2", flags=NO_BOOT) as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1, found["h2"].http() as h2:
            # A project with limits, a network in it, and an administrator's key, which closes TCP on both.
            made = await h1.post("/api/v1/projects", json={"name": "team", "quota": {"vms": 3}})
            assert made.status_code == 201, made.text
            assert (await h2.get("/api/v1/projects/team")).json()["quota"]["vms"] == 3
            in_team = {"Volant-Project": "team"}
            assert (await h2.post("/api/v1/networks", json={"name": "net"}, headers=in_team)).status_code == 201
            again = await h1.post("/api/v1/networks", json={"name": "net"}, headers=in_team)
            assert (again.status_code, again.json()["type"]) == (409, "urn:volant:error:network-exists")

            # Its limits count what all hosts have.
            for name, on in (("vm0", "h1"), ("vm1", "h2"), ("vm2", "h1")):
                vm = await create(h1, name, on)
                assert vm.status_code == 201, vm.text
            with trio.fail_after(SOON_S):
                while (await h2.get("/api/v1/projects/team")).json()["used"]["vms"] != 3:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            more = await create(h2, "vm3", "h2")
            assert (more.status_code, more.json()["type"]) == (409, "urn:volant:error:quota-exceeded")
            for name in ("vm0", "vm1", "vm2"):
                assert (await h2.delete(f"/api/v1/vms/{name}", headers=in_team)).status_code == 204

            # A plugin can't name what only one host has.
            boot = {"kernel": {"url": "/boot/vmlinux", "sha256": "0" * 64}}
            here = await h1.post("/api/v1/plugins", json={"name": "mine", "boot": boot})
            assert (here.status_code, here.json()["type"]) == (422, "urn:volant:error:file-of-one-host")

            # A secret needs a key that both hosts have.
            refused = await h1.put("/api/v1/secrets/token", json=VALUE)
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:volant:error:secrets-key-differs")
            assert (await h1.get("/api/v1/secrets")).json() == []
            copy_secrets_key(found["h1"].daemon.state_dir, found["h2"].daemon.state_dir)
            with trio.fail_after(SOON_S):
                while (put := await h1.put("/api/v1/secrets/token", json=VALUE)).status_code != 200:  # noqa: ASYNC110
                    await trio.sleep(0.1)
            shown = (await h2.get("/api/v1/secrets/token")).json()
            assert (shown["version"], shown["readable"]) == (put.json()["version"], True)

            root = (await h1.post("/api/v1/keys", json={"name": "root", "role": "admin"})).json()["key"]
            assert (await h2.get("/api/v1/projects")).status_code == 401
            for http, host in ((h1, found["h1"]), (h2, found["h2"])):
                http.headers["Authorization"] = f"Bearer {root}"
                host.daemon.key = root
            body = {"name": "ci", "role": "operator", "project": "team"}
            ci = (await h2.post("/api/v1/keys", json=body)).json()["key"]

            # Its streams on the other host end when it is revoked here.
            async with found["h1"].http() as with_ci:
                # In place of the key that the daemon of the test has.
                with_ci.headers["X-Volant-API-Key"] = ci
                assert (await with_ci.get("/api/v1/vms")).status_code == 200
                async with with_ci.stream("GET", "/api/v1/events/vms", timeout=SOON_S) as events:
                    assert events.status_code == 200
                    assert (await h2.delete("/api/v1/keys/ci")).status_code == 204
                    with trio.fail_after(SOON_S):
                        _ = [piece async for piece in events.aiter_text()]
                assert (await with_ci.get("/api/v1/vms")).status_code == 401

            assert (await h2.get("/api/v1/fleet")).json()["trouble"] is None
            # Without etcd, what is there can be read, and changes are refused before anything happens.
            [etcd] = found.cluster.members
            etcd.send(signal.SIGSTOP)
            try:
                late = await h1.post("/api/v1/projects", json=LATE, timeout=SOON_S)
                assert (late.status_code, late.json()["type"]) == (503, "urn:volant:error:fleet-unavailable")
                for http in (h1, h2):
                    assert (await http.get("/api/v1/projects/team")).status_code == 200
                    assert (await http.get("/api/v1/projects/late")).status_code == 404
            finally:
                etcd.send(signal.SIGCONT)
            with trio.fail_after(SOON_S):
                while (made := await h2.post("/api/v1/projects", json=LATE)).status_code != 201:  # noqa: ASYNC110
                    await trio.sleep(0.1)
            assert (await h1.get("/api/v1/projects/late")).status_code == 200
            records = (await h2.get("/api/v1/audit", params={"operation": "delete_key"})).json()
            assert [record["outcome"] for record in records] == ["begun", "done"], json.dumps(records)


def copy_secrets_key(of: Path, to: Path) -> None:
    """As an operator does."""
    path = Path(f"{of}-keys") / "secrets.key"
    target = Path(f"{to}-keys") / "secrets.key"
    target.parent.mkdir(mode=0o700, exist_ok=True)
    target.touch(0o600)
    target.write_bytes(path.read_bytes())
