"""A real `volantd` requires its keys, keeps them secret and reloads them."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import Daemon
from volant.client import Client, ClientProblem
from volant.model import CreateApiKey, Role

pytestmark = pytest.mark.programs

FIRST = "first-0123456789abcdef"
SECOND = "second-0123456789abcdef"
OF_THE_ENVIRONMENT = "environment-0123456789"


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[tuple[Daemon, Path]]:
    """Yields a daemon on an open address and a Unix socket, and its key file."""
    keys = tmp_path / "keys"
    keys.write_text(FIRST)
    keys.chmod(0o600)
    daemon = Daemon(
        tmp_path / "cache",
        *("--listen", f"0.0.0.0:0,unix:{tmp_path}/api.sock", "--api-key-file", str(keys), "--log-level", "debug"),
        environ={"VOLANT_API_KEY": OF_THE_ENVIRONMENT},
    )
    daemon.start()
    daemon.base_url = daemon.base_url.replace("0.0.0.0", "127.0.0.1")
    try:
        yield daemon, keys
    finally:
        daemon.dispose()


async def status(daemon: Daemon, key: str) -> int:
    async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=20) as client:
        return (await client.get("/api/v1/vms", headers={"X-Volant-API-Key": key})).status_code


async def reload(daemon: Daemon, said: str) -> None:
    """Reloads the daemon and waits for the line in its log."""
    before = daemon.log().count(said)
    os.kill(daemon.pid, signal.SIGHUP)
    with trio.fail_after(20):
        while daemon.log().count(said) == before:  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_keys_are_required_kept_secret_and_reloaded(guarded: tuple[Daemon, Path], tmp_path: Path) -> None:
    daemon, keys = guarded
    path = tmp_path / "api.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    async with Client(f"unix:{path}") as client:
        assert await client.vms.list() == []
    async with Client(daemon.base_url) as client:
        assert (await client.healthz()).status in ("ok", "starting")
        with pytest.raises(ClientProblem, match="requires an API key"):
            await client.vms.list()
    async with Client(daemon.base_url, api_key=FIRST) as client:
        assert FIRST not in str(await client.system.info())
        async with client.events(after="0"):
            pass
        ticket = (await client.system.ticket()).ticket
    async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=20) as anonymous:
        for expected in (200, 401):
            async with anonymous.stream("GET", "/api/v1/events/vms", params={"ticket": ticket}) as answer:
                assert answer.status_code == expected
    assert await status(daemon, OF_THE_ENVIRONMENT) == 200

    keys.write_text(f"{FIRST}\n{SECOND}\n")
    await reload(daemon, "reloaded keys")
    assert [await status(daemon, key) for key in (FIRST, SECOND)] == [200, 200]
    keys.write_text(SECOND)
    await reload(daemon, "reloaded keys")
    assert [await status(daemon, key) for key in (FIRST, SECOND)] == [401, 200]
    keys.write_text("")
    await reload(daemon, "the old settings stay")
    assert [await status(daemon, key) for key in (FIRST, SECOND)] == [401, 200]

    assert daemon.stop() == 0
    for key in (FIRST, SECOND, OF_THE_ENVIRONMENT):
        assert key not in daemon.log_path.read_text()


async def test_a_daemon_with_named_keys_may_listen_on_other_addresses(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with Client(daemon.base_url) as client:
        made = await client.keys.create(CreateApiKey(name="ops", role=Role.ADMIN))
    # The fixture stops the daemon with it.
    daemon.key = made.key
    assert daemon.stop() == 0
    daemon.command = [*daemon.command, "--listen", "0.0.0.0:0"]
    daemon.start()
    daemon.base_url = daemon.base_url.replace("0.0.0.0", "127.0.0.1")
    assert [await status(daemon, key) for key in ("", made.key)] == [401, 200]
