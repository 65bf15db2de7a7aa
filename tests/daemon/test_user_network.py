"""The network `user` gives a guest the host's address, so it is refused where clients need only an address."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import Daemon
from volant.network import passt_obstacle

pytestmark = pytest.mark.programs

_KEY = "user-network-0123456789abcdef"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--api-allow-cidr", "127.0.0.0/8"), None),
        (("--insecure", "--listen", "0.0.0.0:0"), None),
        (("--api-allow-cidr", "127.0.0.0/8"), _KEY),
    ],
)
async def test_the_network_user_is_refused_where_an_address_is_enough(
    tmp_path: Path, options: tuple[str, ...], key: str | None
) -> None:
    daemon = Daemon(
        tmp_path / "cache",
        *("--network", "user", *options),
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
async def test_vms_with_a_network_that_is_refused_by_now_are_logged(tmp_path: Path) -> None:
    # A file that is not a kernel ends the boot at once.
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
        said = "these VMs have the network 'user': demo; the daemon accepts requests from other addresses than loopback"
        assert said not in daemon.log()
        del daemon.environ["VOLANT_API_KEY"]
        daemon.key = None
        daemon.start()
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=20) as client:
            with trio.fail_after(20):
                while (await client.get("/healthz")).json()["status"] == "starting":  # noqa: ASYNC110 - the daemon's
                    await trio.sleep(0.02)
            assert said in daemon.log()
            # It can't be started any more.
            with trio.fail_after(20):
                while (vm := (await client.get("/api/v1/vms/demo")).json())["status"] != "crashed":  # noqa: ASYNC110
                    await trio.sleep(0.02)
            for command in ("start", "restart"):
                answer = await client.post(f"/api/v1/vms/demo/{command}")
                assert answer.status_code == 409, (answer.text, vm)
                assert answer.json()["detail"].startswith("VM 'demo' can't have the network 'user': the daemon accepts")
            await client.delete("/api/v1/vms/demo")
    finally:
        daemon.dispose()


@pytest.mark.skipif(passt_obstacle() is not None, reason="passt is not installed")
async def test_an_unfiltered_network_is_reported_on_the_vm(tmp_path: Path) -> None:
    # Root in a container without other users.
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
