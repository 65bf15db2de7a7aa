"""A guest can't redirect its client to the daemon, or to anything else that the client can reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.api.kit import bare, request, running
from tests.api.test_relay import WAYS, guest, prefix
from tests.attackers.redirecting_guest import CLIENTS, HOSTS, NAME, PLUGIN, send_to_all, spellings
from tests.system.kit import BOOT_S, Daemon, spec
from volant.http import Access, ApiSettings
from volant.model import Problem


@pytest.mark.parametrize("client", CLIENTS)
async def test_no_spelling_of_the_daemon_redirects_a_client_to_another_vm(tmp_path: Path, client: str) -> None:
    async with guest(tmp_path) as at:
        at.api.access.replace(ApiSettings(allowed_hosts=(NAME,)))
        await at.api.create("victim")
        base = f"http://127.0.0.1:{at.api.server.port}"
        for way in WAYS:
            before = len(at.seen)
            # The loopback of this "guest" is ours, so its own addresses lead to the daemon: the real guest has those.
            addresses = spellings(at.api.server.port, "/api/v1/vms/victim", own=False)
            await send_to_all(client, "DELETE", f"{base}{prefix(at, way)}/moved", addresses)
            assert (await at.client.get("/api/v1/vms/victim")).status_code == 200
            assert len(at.seen) - before >= len(addresses), "the guest was not asked"


@pytest.mark.parametrize("client", CLIENTS)
async def test_no_other_service_of_the_clients_host_is_reached(tmp_path: Path, client: str) -> None:
    seen: list[str] = []

    async def service(scope: object, receive: object, send: object) -> None:
        seen.append("asked")

    async with guest(tmp_path) as at, running(bare(service)) as other:
        base = f"http://127.0.0.1:{at.api.server.port}"
        addresses = [f"http://{host}:{other.port}/x" for host in HOSTS]
        await send_to_all(client, "POST", f"{base}{prefix(at, 'port')}/moved", addresses)
        assert seen == []


async def test_a_redirect_to_another_host_is_reported_and_not_followed(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            answer = await at.api.server.get(f"{prefix(at, way)}/moved?to=http://elsewhere.example/")
            assert (answer.status, answer.headers["volant-location"]) == (307, "http://elsewhere.example/")
            assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:7777", True),
        ("127.0.0.1:", True),
        ("localhost:1", True),
        ("LocalHost", True),
        ("[::1]", True),
        ("[::1]:7777", True),
        ("127.8.8.8", True),
        (NAME, True),
        (f"{NAME}:7777", True),
        ("[::ffff:127.0.0.1]", False),
        ("[::ffff:7f00:1]:7777", False),
        ("[0:0:0:0:0:0:0:1]", False),
        ("[::0001]", False),
        ("[::1%lo]", False),
        ("[127.0.0.1]", False),
        ("::1", False),
        ("127.1", False),
        ("2130706433", False),
        ("0x7f000001", False),
        ("0", False),
        ("0.0.0.0", False),
        ("127.0.0.1.", False),
        ("attacker.example[::1]", False),
        ("[::1]attacker.example", False),
        ("127.0.0.1@attacker.example", False),
        ("127.0.0.1:99999", False),
        ("127.0.0.1:7777:8888", False),
        ("127.0.0.1\\attacker.example", False),
        ("", False),
    ],
)
def test_an_address_in_host_must_have_its_usual_spelling(host: str, known: bool) -> None:
    scope = {
        "type": "http", "method": "GET", "raw_path": b"/", "query_string": b"",
        "headers": [(b"host", host.encode())], "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 7777), "state": {},
    }  # fmt: skip
    access = Access(ApiSettings(allowed_hosts=(NAME,)))
    if known:
        access.check(scope)
        return
    with pytest.raises(Problem) as refused:
        access.check(scope)
    assert refused.value.status == 421


async def test_a_daemon_on_both_families_accepts_no_mapped_address(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        answer = await at.api.server.ask(request("GET", "/healthz", Host=f"[::ffff:127.0.0.1]:{at.api.server.port}"))
        assert answer.status == 421


@pytest.mark.full
@pytest.mark.system
async def test_a_real_guest_controls_nothing_through_its_clients(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--allowed-hosts", NAME)
    async with daemon.client() as client:
        await client.plugins.install(PLUGIN)
        await client.vms.create(spec("victim"))
        waited = await client.vms.create_and_wait(spec("demo", plugin="redirecting"), timeout_s=BOOT_S)
        assert waited.outcome == "met", waited
        with trio.fail_after(60):
            while (await client.vms.agent_health("demo"))["workload"]["state"] != "healthy":  # noqa: ASYNC110
                await trio.sleep(0.1)
        port = int(daemon.base_url.rpartition(":")[2])
        for follower in CLIENTS:
            for way in ("agent", "ports/8080"):
                guest_url = f"{daemon.base_url}/api/v1/vms/demo/{way}/any"
                await send_to_all(follower, "DELETE", guest_url, spellings(port, "/api/v1/vms/victim"))
                assert (await client.vms.get("victim")).desired == "running"
                await send_to_all(follower, "POST", guest_url, spellings(port, "/api/v1/system/drain"))
                assert (await client.system.status()).draining_since is None
