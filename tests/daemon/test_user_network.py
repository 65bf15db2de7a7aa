"""A guest with the network `user` has an address of the host's: it is refused where an address alone lets in."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.system.kit import Daemon

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
