"""Real guests with secrets: who gets the values, when, and where else they are in plain text, which is nowhere."""

from __future__ import annotations

import base64
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.files import everything_in
from tests.system.kit import Daemon, boot, kept, run, until
from tests.system.test_standby import filled
from tests.system.test_templates import template
from volant.client import Client
from volant.model import ForkVm, RestoreVm, SecretRef, SetSecret, TakeSnapshot

_OF_OTHERS = (0x04, 0x20)
"""Tags of an access list: the file's group, and everybody."""
SEEN = 'printf "%s" "$TOKEN" > /tmp/seen.new; mv /tmp/seen.new /tmp/seen; while :; do sleep 5; done'
KEEPER = {
    "name": "keeper",
    "resources": {"memory_mb": 128},
    "workload": {"entrypoint": ["/bin/sh", "-c", SEEN], "user": "1000", "restart": "always"},
    "exec": {},
}


@pytest.fixture(scope="module")
def shared(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    daemon = Daemon(image_cache, "--templates", "auto", "--standby", "1", ephemeral=False)

    async def prepare() -> None:
        async with daemon.client() as client:
            await client.plugins.install(KEEPER)
            await boot(client, "first", plugin="keeper")
            await template(daemon)
            await client.vms.delete("first")

    with kept(daemon, _running):
        trio.run(prepare)
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    yield shared
    if not shared.runs:
        shared.start()
    shared.delete_vms()
    with httpx.Client(base_url=shared.base_url, trust_env=False, timeout=30) as client:
        for kind in ("snapshots", "secrets"):
            for one in client.get(f"/api/v1/{kind}").json():
                client.delete(f"/api/v1/{kind}/{one['name']}").raise_for_status()


def new_value() -> str:
    return f"horse-{secrets.token_hex(12)}"


async def put(client: Client, value: str, name: str = "token") -> str:
    await client.secrets.set(name, SetSecret(value=value))
    return value


async def keeper(client: Client, name: str, boot_from: str = "auto") -> str | None:
    """Boots a VM with the secret `token` in its environment and as a file; returns what it was booted from."""
    vm = await boot(
        client, name, plugin="keeper", boot=boot_from, env={"TOKEN": SecretRef("token")}, secrets=("token",)
    )
    assert vm.fallback is None
    assert vm.secrets == ("token",)
    return vm.booted_from


async def check(client: Client, name: str, value: str, *, workload: str | None = None) -> None:
    """Checks that a guest has a value: in its workload, in commands, and as a file of the workload's user."""
    with trio.fail_after(60):
        while (seen := await run(client, name, "sh", "-c", "cat /tmp/seen 2>/dev/null || true")) == "":  # noqa: ASYNC110
            await trio.sleep(0.2)
    assert seen == (workload or value)
    assert await run(client, name, "sh", "-c", 'printf "%s" "$TOKEN"') == value
    assert await run(client, name, "cat", "/run/secrets/token") == value
    assert (await run(client, name, "stat", "-c", "%a %u", "/run/secrets/token")).split() == ["400", "1000"]
    assert (await run(client, name, "ls", "-A", "/run/secrets")).split() == ["token"]


@pytest.mark.system
async def test_every_kind_of_boot_gives_the_value_of_that_moment(daemon: Daemon) -> None:
    began = time.time() - 1
    async with daemon.client() as client:
        first = await put(client, new_value())
        assert await keeper(client, "cold", "cold") == "cold"
        await check(client, "cold", first)
        second = await put(client, new_value())
        await check(client, "cold", first)
        await client.vms.restart("cold")
        await client.vms.wait("cold", ("running",), timeout_s=120)
        assert await until(client, "cold", "ready")
        await check(client, "cold", second)
        assert await keeper(client, "clone", "template") == "template"
        await check(client, "clone", second)
        pids = await filled(daemon)
        third = await put(client, new_value())
        assert await keeper(client, "warm") == "template"
        vm = await client.vms.get("warm")
        assert vm.pid in pids
        await check(client, "warm", third)
        # Its programs go on with what they have; whatever starts then has the present values.
        fourth = await put(client, new_value())
        (copy,) = await client.vms.fork("warm", ForkVm(names=["copy"]))
        assert copy.secrets == ("token",)
        assert await until(client, "copy", "running")
        await check(client, "copy", fourth, workload=third)
        await check(client, "warm", third)
        snapshot = await client.snapshots.take("warm", TakeSnapshot(name="kept"))
        assert snapshot.secrets == ("token",)
        fifth = await put(client, new_value())
        await client.vms.create(RestoreVm(name="restored", from_snapshot="kept"))
        assert await until(client, "restored", "running")
        await check(client, "restored", fifth, workload=third)
        await check_nowhere(daemon, client, (first, second, third, fourth, fifth), since=began)


async def check_nowhere(daemon: Daemon, client: Client, values: Iterable[str], *, since: float) -> None:
    """Checks that no value is in plain text but in the memory of guests and in snapshots, whose files are private.

    :param since: when the values were made; the cache has gigabytes that are older
    """
    needles = [form for value in values for form in (value.encode(), base64.b64encode(value.encode()))]
    backup = daemon.root / "backup.db"
    with backup.open("wb") as file:
        async with client.system.backup() as download:
            async for piece in download:
                file.write(piece)
    cache = Path(daemon.command[daemon.command.index("--cache-dir") + 1])
    snapshots, memory = daemon.state_dir / "snapshots", 0
    for root in (daemon.root, daemon.memory_dir, cache):
        for path in everything_in(root):
            if not path.is_file() or path.is_symlink() or path.stat().st_ctime < since:
                continue
            if daemon.memory_dir in path.parents or snapshots in path.parents:
                memory += found_in(path, needles)
                assert is_private(path), path
                continue
            assert not found_in(path, needles), path
    assert memory, "not even the memory of guests has them, so this looks for the wrong thing"
    async with daemon.http() as http:
        for where in (
            *("vms", "vms/warm", "vms/warm/inspect", "vms/warm/logs", "vms/copy", "vms/restored", "secrets"),
            *("secrets/token", "snapshots", "snapshots/kept", "templates", "plugins", "plugins/keeper/manifest"),
            *("system/info", "system/tree", "system/status", "system/tasks", "vms/warm/agent/v1/info"),
        ):
            answer = await http.get(f"/api/v1/{where}")
            assert answer.status_code == 200, answer.text
            assert not any(needle in answer.content for needle in needles), where
        async with http.stream("GET", "/api/v1/events/vms?since=0") as events:
            with trio.move_on_after(3):
                async for chunk in events.aiter_raw():
                    assert not any(needle in chunk for needle in needles)
    for pid in (daemon.pid, *daemon.processes()):
        for name in ("cmdline", "environ"):
            assert not found_in(Path(f"/proc/{pid}/{name}"), needles), (pid, name)


def is_private(path: Path) -> bool:
    """Whether at most the daemon's user, and the users of hypervisors that an access list names, may use a file."""
    try:
        data = os.getxattr(path, "system.posix_acl_access")
    except OSError:
        return path.stat().st_mode & 0o077 == 0
    entries = [struct.unpack_from("<HH", data, at) for at in range(4, len(data), 8)]
    return not any(permissions for tag, permissions in entries if tag in _OF_OTHERS)


def found_in(path: Path, needles: Iterable[bytes]) -> bool:
    """Whether one of some texts is in a file."""
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                # Files of /proc have no size.
                data = file.read()
                return any(needle in data for needle in needles)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return any(content.find(needle) >= 0 for needle in needles)
    except (FileNotFoundError, OSError):
        return False
