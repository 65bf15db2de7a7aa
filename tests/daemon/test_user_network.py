"""A guest with the network `user` has an address of the host's: it is refused where an address alone lets in."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import Daemon
from volant.network import passt_obstacle

_KEY = "user-network-0123456789abcdef"


@pytest.mark.parametrize("key", [None, _KEY])
async def test_the_network_user_is_refused_where_an_address_alone_lets_in(tmp_path: Path, key: str | None) -> None:
    daemon = Daemon(
        tmp_path / "cache",
        *("--network", "user", "--api-allow-cidr", "127.0.0.0/8"),
        ephemeral=False,
        environ={"VOLANT_API_KEY": key} if key else {},
    )
    try:
        daemon.start()
        headers = {"X-Volant-API-Key": key} if key else {}
        async with httpx.AsyncClient(base_url=daemon.base_url, headers=headers, trust_env=False, timeout=20) as client:
            said = (await client.get("/api/v1/system/info")).json()["networks"]["user"]
            assert ("api_allow_cidr" in said) is (key is None)
            if key is None:
                for network in ({}, {"network": "user"}):
                    answer = await client.post(
                        "/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128, **network}
                    )
                    assert (answer.status_code, answer.json()["field"]) == (409, "network")
                    assert "set an API key" in answer.json()["detail"]
    finally:
        daemon.dispose()


@pytest.mark.skipif(passt_obstacle() is not None, reason="passt is not installed")
async def test_the_log_names_vms_that_have_it_from_before(tmp_path: Path) -> None:
    # What is no kernel ends the boot at once.
    nothing = ("--kernel", __file__, "--initramfs", __file__)
    daemon = Daemon(
        tmp_path / "cache",
        *("--network", "user", "--api-allow-cidr", "127.0.0.0/8", *nothing),
        ephemeral=False,
        environ={"VOLANT_API_KEY": _KEY},
    )
    try:
        daemon.start()
        headers = {"X-Volant-API-Key": _KEY}
        async with httpx.AsyncClient(base_url=daemon.base_url, headers=headers, trust_env=False, timeout=20) as client:
            answer = await client.post("/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128})
            assert answer.status_code == 201, answer.text
        daemon.terminate()
        daemon.wait()
        said = "these VMs have the network 'user': demo; the daemon lets addresses in without a key"
        assert said not in daemon.log()
        del daemon.environ["VOLANT_API_KEY"]
        daemon.key = None
        daemon.start()
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=20) as client:
            with trio.fail_after(20):
                while (await client.get("/healthz")).json()["status"] == "starting":  # noqa: ASYNC110 - the daemon's
                    await trio.sleep(0.02)
            assert said in daemon.log()
            # Nor is it started any more, by anybody.
            with trio.fail_after(20):
                while (vm := (await client.get("/api/v1/vms/demo")).json())["status"] != "crashed":  # noqa: ASYNC110
                    await trio.sleep(0.02)
            for command in ("start", "restart"):
                answer = await client.post(f"/api/v1/vms/demo/{command}")
                assert answer.status_code == 409, (answer.text, vm)
                assert answer.json()["detail"].startswith("VM 'demo' can't have the network 'user': the daemon lets")
            await client.delete("/api/v1/vms/demo")
    finally:
        daemon.dispose()


@pytest.mark.skipif(passt_obstacle() is not None, reason="passt is not installed")
async def test_where_destinations_can_not_be_filtered_the_vm_says_so(tmp_path: Path) -> None:
    # Root of a container that has no other user.
    daemon = Daemon(tmp_path / "cache", "--network", "user", wrapper=("unshare", "--user", "--map-root-user"))
    try:
        daemon.start()
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=20) as client:
            info = (await client.get("/api/v1/system/info")).json()
            answer = await client.post("/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": 128})
            for said in (info["networks"]["user"], answer.json()["network_reason"]):
                assert "its destinations are not filtered, so a guest reaches this host's own addresses" in said
            await client.delete("/api/v1/vms/demo")
    finally:
        daemon.dispose()
