"""A restore loses no running VM, also when the database is damaged."""

# ruff: noqa: ASYNC221 - nothing else runs in this event loop meanwhile

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.kit import Daemon, adopted, boot, is_alive, next_event, runs_on, spec
from volant.client import Client, ClientProblem, StreamGap


def volar(daemon: Daemon, *words: str, code: int = 0) -> Any:
    """Runs `volar`; returns its output as JSON, or its errors as text."""
    command = [sys.executable, "-m", "volant.cli.main", *words, *(["--json"] if not code else [])]
    environ = {**daemon.environ, "VOLANT_API_BASE": daemon.base_url}
    done = subprocess.run(command, env=environ, capture_output=True, timeout=90, check=False)
    assert done.returncode == code, (words, done)
    return msgspec.json.decode(done.stdout) if not code else done.stderr.decode()


def restore_offline(daemon: Daemon, file: Path, *flags: str) -> subprocess.CompletedProcess[bytes]:
    at = daemon.command.index("volant.daemon.main") + 1
    command = [*daemon.command[:at], "restore", str(file), *flags, *daemon.command[at:]]
    return subprocess.run(command, env=daemon.environ, capture_output=True, timeout=60, check=False)


async def stopped_vm(client: Client, name: str) -> None:
    """Creates a VM that does not boot."""
    await client.vms.create(spec(name))
    assert (await client.vms.apply_and_wait(name, "stop", ["stopped"], grace_s=0)).outcome == "met"


async def test_a_restore_loses_no_running_vm(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon(ephemeral=False)
    kept = tmp_path / "kept.db"
    async with daemon.client() as client:
        stays = await boot(client, "stays")
        await stopped_vm(client, "deleted-later")
        said = volar(daemon, "system", "backup", str(kept))
        assert said == {"path": str(kept), "bytes": kept.stat().st_size}
        await client.vms.delete("deleted-later")
        orphan = await boot(client, "made-later")
        newest = await client.newest_event()
    assert daemon.stop() == 0
    refused = restore_offline(daemon, kept)
    assert refused.returncode == 1
    assert b"does not know these VMs: made-later" in refused.stderr
    done = restore_offline(daemon, kept, "--replace")
    assert done.returncode == 0, done
    assert b"restored 2 VMs" in done.stdout

    daemon.start()
    async with daemon.client() as client:
        await adopted(client)
        epoch = (await client.system.info())["event_epoch"]
        async with client.events(after=newest) as feed:
            gap = await feed.receive()
            assert isinstance(gap, StreamGap)
            assert gap.requested == newest
            assert (await next_event(feed)).id == gap.oldest == f"{epoch}-1"
        await runs_on(client, stays)
        assert (await client.vms.get("deleted-later")).status == "stopped"
        assert orphan.pid is not None
        assert is_alive(orphan.pid)
        assert [found["pid"] for found in (await client.system.info())["orphans"]] == [orphan.pid]
        assert sorted(vm.name for vm in await client.vms.list()) == ["deleted-later", "stays"]
        # No id is reused.
        await client.vms.create(spec("next"))
        assert (await client.vms.get("next")).id == orphan.id + 1
        await client.vms.delete("next")
        os.kill(orphan.pid, signal.SIGKILL)
        _remove_files_of(daemon, orphan.id)


def _remove_files_of(daemon: Daemon, vm_id: int) -> None:
    """Removes what an orphaned VM leaves behind."""
    subprocess.run(
        ["rm", "-rf", str(daemon.runtime_dir / "vms" / str(vm_id)), str(daemon.memory_dir / f"{vm_id}.mem")], check=True
    )


async def test_a_damaged_database_is_kept_and_a_backup_brings_the_running_vm_back(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon(ephemeral=False)
    kept = tmp_path / "kept.db"
    async with daemon.client() as client:
        vm = await boot(client, "demo")
        volar(daemon, "system", "backup", str(kept))
        # The backup does not contain the newest boot.
        await client.vms.apply_and_wait("demo", "restart", ["running"], timeout_s=120)
        vm = await client.vms.get("demo")
    assert b"another volantd (process" in restore_offline(daemon, kept).stderr
    daemon.kill()
    database = daemon.state_dir / "volant.db"
    whole = database.read_bytes()
    wal = database.with_name("volant.db-wal")

    data = whole[: len(whole) // 2]
    wal.unlink()
    database.write_bytes(data)
    refused = subprocess.run(daemon.command, env=daemon.environ, capture_output=True, timeout=60, check=False)
    last = refused.stderr.decode().splitlines()[-1]
    assert refused.returncode == 1
    assert last.startswith(f"volantd: {database} is damaged"), last
    assert "`volantd restore BACKUP`" in last
    assert database.read_bytes() == data

    done = restore_offline(daemon, kept)
    assert done.returncode == 0, done
    assert b"restored 1 VMs" in done.stdout
    assert b"TCP needs credentials from now on" in done.stdout
    assert [path.read_bytes() for path in daemon.state_dir.glob("volant-before-*.db")] == [data]

    # Nobody knows whether the damaged database had keys.
    async with daemon.started() as client:
        with pytest.raises(ClientProblem) as refused_without:
            await client.vms.get("demo")
        assert refused_without.value.status == 401
    assert daemon.stop() == 0
    daemon.use_key("0123456789abcdef")
    async with daemon.started() as client:
        await runs_on(client, vm, boots=2)
        assert (await client.system.info())["orphans"] == []
