"""A real `volantd` requires its keys, keeps them secret and reloads them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import Daemon
from volant.client import Client, ClientProblem

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


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({"VOLANT_API_ALLOW_CIDR": "10.0.0.0/8,nonsense"}, [], "'nonsense' is no network"),
        ({"VOLANT_API_KEY": ""}, [], "api_key (from the environment) is empty"),
        ({}, ["--listen", "0.0.0.0:0"], "--insecure"),
    ],
)
def test_the_daemon_does_not_start_with_invalid_access_control(
    tmp_path: Path, environ: dict[str, str], flags: list[str], words: str
) -> None:
    daemon = Daemon(tmp_path, *flags, environ=environ)
    try:
        ended = subprocess.run(
            daemon.command, env=daemon.environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert words in ended.stderr
    finally:
        daemon.dispose()
