"""`volar fleet join` and `leave`, with a real etcd and real daemons: they check, then change, and lose nothing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from tests.fleet.cluster import Cluster, cluster, needs_etcd
from tests.ports import free_port
from tests.system.kit import Daemon, adopted, cache_dir
from volant.fleet import delete, open_etcd, put as step

pytestmark = [pytest.mark.system, needs_etcd]
_S = 60.0


class OneHost:
    """A host whose settings are in a file, and its commands."""

    def __init__(self, directory: Path, etcd: Cluster, name: str = "h1") -> None:
        assert etcd.authority is not None
        self.etcd = etcd
        self.config = directory / "volantd.toml"
        self.config.write_text("# Mine\nmax_vms = 7\n")
        self.port = free_port()
        self.daemon = Daemon(cache_dir(), "--config", str(self.config), ephemeral=False)
        self._name = name
        self._certificate = etcd.authority.issue(f"{name}.example", client=True, server=True)
        self._authority = etcd.authority.path

    def volar(self, *words: str) -> subprocess.CompletedProcess[str]:
        base = {"VOLANT_API_BASE": self.daemon.base_url} if self.daemon.base_url else {}
        return subprocess.run(
            [sys.executable, "-m", "volant.cli.main", *words, "--config", str(self.config)],
            env={**self.daemon.environ, **base, "VOLANT_STATE_DIR": str(self.daemon.state_dir)},
            capture_output=True, text=True, timeout=_S, check=False,
        )  # fmt: skip

    def join(self, **changed: str) -> subprocess.CompletedProcess[str]:
        options = {
            "etcd": ",".join(self.etcd.settings().endpoints), "listen": f"127.0.0.1:{self.port}", "host": self._name,
            "cert": str(self._certificate), "ca": str(self._authority), **changed,
        }  # fmt: skip
        return self.volar("fleet", "join", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()))

    async def keys(self) -> set[str]:
        """Returns what etcd has of all fleets."""
        async with open_etcd(self.etcd.settings()) as etcd:
            return {entry.key for entry in (await etcd.list("volant/"))[0]}


async def test_a_host_joins_leaves_and_keeps_its_vms(tmp_path: Path) -> None:
    with cluster(tmp_path, tls=True) as etcd:
        await etcd.ready()
        host = OneHost(tmp_path, etcd)
        try:
            joined = host.join(zone="rack 7", label="disk=nvme")
            assert joined.returncode == 0, joined.stderr
            assert "host h1 can be one of the fleet, as its first host" in joined.stdout
            assert f"run `volantd --config {host.config}`" in joined.stdout
            written = host.config.read_text()
            assert written.startswith("# Mine\nmax_vms = 7\n")
            assert tomllib.loads(written)["fleet_zone"] == "rack 7"
            assert "has these settings already" in host.join(zone="rack 7", label="disk=nvme").stdout
            assert host.config.read_text() == written

            async with host.daemon.started(), host.daemon.http() as http:
                await up(http)
                assert (await http.post("/api/v1/vms", json=spec("web"))).status_code == 201
                status = (await http.get("/api/v1/fleet")).json()
                assert (status["host"], status["etcd"]) == ("h1", "ok")
                assert {"volant/vms/default/web", "volant/hosts/h1"} <= await host.keys()
                # While its daemon runs, it is still the host that has the name.
                assert host.join(zone="rack 7", label="disk=nvme").returncode == 0

                # What etcd has lost of a host, it writes again.
                await lose(etcd, "volant/hosts/h1", "volant/load/h1")
                with trio.fail_after(_S):
                    while not {"volant/hosts/h1", "volant/load/h1"} <= await host.keys():  # noqa: ASYNC110
                        await trio.sleep(0.1)

                refused = host.volar("fleet", "leave")
                assert (refused.returncode, tomllib.loads(host.config.read_text())["fleet_host"]) == (4, "h1")
                assert "the fleet would not find what this host has any more (vms: web)" in refused.stderr
                left = host.volar("fleet", "leave", "--keep-vms")
                assert left.returncode == 0, left.stderr
                assert host.config.read_text() == "# Mine\nmax_vms = 7\n"
                # Numbers are never given again: ids of VMs begin with them.
                assert await host.keys() == {"volant/numbers/1", "volant/numbers/2", "volant/agreed"}
                # Until it is restarted, it makes nothing that others would have to know, and shows what it has.
                refusal = await http.post("/api/v1/vms", json=spec("more"))
                assert (refusal.status_code, refusal.json()["type"]) == (503, "urn:volant:error:fleet-unavailable")
                assert "restart volantd" in refusal.text
                assert (await http.get("/api/v1/vms/web")).status_code == 200
                assert (await http.get("/api/v1/hosts")).status_code == 409
                again = host.volar("fleet", "leave")
                assert (again.returncode, "does not know this host" in again.stdout) == (0, True)
            assert host.daemon.stop() == 0
            async with host.daemon.started() as client:
                await adopted(client)
                assert [vm.name for vm in await client.vms.list()] == ["web"]
                none = host.volar("fleet", "leave", "--json")
                assert none.returncode == 0, none.stderr
                assert msgspec.json.decode(none.stdout)["left"] is False
            host.daemon.dispose()
        finally:
            host.daemon.discard()


async def test_a_host_that_could_not_be_one_of_the_fleet_writes_nothing(tmp_path: Path) -> None:
    with cluster(tmp_path, tls=True) as etcd:
        await etcd.ready()
        assert etcd.authority is not None
        host = OneHost(tmp_path, etcd)
        try:
            only_server = etcd.authority.issue("server.example", server=True)
            for changed, said in (
                ({"etcd": f"https://127.0.0.1:{free_port()}"}, "etcd can't be used"),
                ({"address": "elsewhere.example:1"}, "certificate is not valid for 'elsewhere.example'"),
                ({"cert": str(only_server)}, "it is not good for clients"),
                ({"cert": str(tmp_path / "none.pem")}, "none.pem can't be read"),
                ({"listen": "192.0.2.77:7"}, "Cannot assign requested address"),
                ({"label": "nvme"}, "is not KEY=VALUE"),
            ):
                refused = host.join(**changed)
                assert (refused.returncode, said in refused.stderr) == (1, True), refused.stderr
                assert "nothing was changed" in refused.stderr
            # The name is another host's.
            body = {"id": "0123abcd", "number": 1, "facts": facts()}
            await put(etcd, "volant/hosts/h1", msgspec.json.encode(body))
            refused = host.join()
            assert "another host of the fleet is named 'h1'" in refused.stderr
            assert host.config.read_text() == "# Mine\nmax_vms = 7\n"
            unreachable = host.volar("fleet", "leave", "--api", f"http://127.0.0.1:{free_port()}")
            assert unreachable.returncode == 1
            assert "only a running volantd can leave its fleet" in unreachable.stderr
        finally:
            host.daemon.discard()


def spec(name: str) -> dict[str, Any]:
    return {"name": name, "memory_mb": 128}


async def up(http: httpx.AsyncClient) -> None:
    """Waits until the host is one of its fleet."""
    with trio.fail_after(_S):
        while not [host for host in (await http.get("/api/v1/hosts")).json() if host["state"] == "up"]:  # noqa: ASYNC110
            await trio.sleep(0.05)


def facts() -> dict[str, Any]:
    return {"address": "192.0.2.1:1", "version": "0", "architecture": "x86_64", "cpu_cores": 1, "memory_mb": 1}


async def lose(etcd: Cluster, *keys: str) -> None:
    async with open_etcd(etcd.settings()) as client:
        await client.transact([], [delete(key) for key in keys])


async def put(etcd: Cluster, key: str, value: bytes) -> None:
    async with open_etcd(etcd.settings()) as client:
        await client.transact([], [step(key, value)])
