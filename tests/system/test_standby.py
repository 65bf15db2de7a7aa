"""Processes that wait for a VM become that VM, and are nobody's for as long as they wait."""

from __future__ import annotations

import operator
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, is_alive, kept, reachable, run, until
from tests.system.rootfs import make_ext4, plugin
from tests.system.test_templates import eventually, template, who
from volant.client import Client


@pytest.fixture(scope="module")
def pool(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    """A daemon with a template and a process in its warm pool."""
    daemon = Daemon(image_cache, "--templates", "auto", "--standby", "1", ephemeral=False)

    async def prepare() -> None:
        async with daemon.client() as client:
            await boot(client, "first")
            await template(daemon)
            # The daemon fills the pool of a template as soon as it is built.
            await filled(daemon)
            await client.vms.delete("first")

    with kept(daemon, _running):
        trio.run(prepare)
        yield daemon


@pytest.fixture
def daemon(pool: Daemon) -> Iterator[Daemon]:
    yield pool
    pool.delete_vms()
    assert not pool.hypervisors()
    assert not pool.files()


def waiting(daemon: Daemon) -> dict[int, Path]:
    """Returns the working directories of the processes in the warm pool, by pid."""
    found = {}
    for pid in daemon.processes():
        try:
            directory = Path(f"/proc/{pid}/cwd").readlink()
        except FileNotFoundError:
            continue
        if directory.parent == daemon.runtime_dir / "standby":
            found[pid] = directory
    return found


async def filled(daemon: Daemon, count: int = 1, *, exactly: bool = True) -> set[int]:
    """Waits for a number of processes in the warm pool that have loaded their template; returns their pids."""
    enough = operator.eq if exactly else operator.ge
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            while True:
                (said,) = re.findall(r"^volant_standby_waiting (\d+)", (await http.get("/metrics")).text, re.MULTILINE)
                found = waiting(daemon)
                if enough(int(said), count) and len(found) == int(said):
                    return set(found)
                await trio.sleep(0.2)


async def count(daemon: Daemon, what: str) -> float:
    async with daemon.http() as http:
        for line in (await http.get("/metrics")).text.splitlines():
            if line.startswith(f"volant_standby_{what} "):
                return float(line.split()[1])
    raise AssertionError(f"no figure {what}")


async def test_a_vm_claims_a_process_of_the_warm_pool(daemon: Daemon) -> None:
    async with daemon.client() as client:
        (pid,), claims = await filled(daemon), await count(daemon, "claims_total")
        vm = await boot(client, "third")
        assert (vm.pid, vm.booted_from, vm.fallback) == (pid, "template", None)
        assert await count(daemon, "claims_total") == claims + 1
        third = await who(client, "third")
        assert third["hostname"] == "third"
        # The pool is filled again, and the next VM has another identity.
        assert pid not in await filled(daemon)
        await boot(client, "fourth")
        fourth = await who(client, "fourth")
        for what in ("urandom", "machine_id", "boot_id", "hostname"):
            assert third[what] != fourth[what], what
        await run(client, "third", "sh", "-c", "echo here >/run/mine; echo a word >/dev/console")
        await client.vms.stop("third")
        assert await until(client, "third", "stopped")
        assert not is_alive(pid)


@pytest.mark.full
async def test_a_clean_stop_ends_them_and_no_vm(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await filled(daemon)
        vm = await boot(client, "kept")
        (pid,) = await filled(daemon)
    assert daemon.stop() == 0
    assert not is_alive(pid)
    assert list(daemon.hypervisors()) == [vm.pid]
    assert not list(daemon.runtime_dir.glob("standby/*"))
    async with daemon.started() as client:
        await reachable(client, "kept")
        assert (await client.vms.get("kept")).pid == vm.pid
        await refill(daemon, client)


@pytest.mark.full
async def test_after_kill_nine_the_next_daemon_ends_them(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await filled(daemon)
        vm = await boot(client, "kept")
        (pid,) = await filled(daemon)
    daemon.kill()
    assert is_alive(pid)
    # Even without the database, the working directory tells a VM from a process of the pool.
    for path in daemon.state_dir.glob("volant.db*"):
        path.unlink()
    async with daemon.started() as client:
        await eventually(lambda: not is_alive(pid))
        assert list(daemon.hypervisors()) == [vm.pid]
        (orphan,) = await client.system.orphans()
        assert (orphan.name, orphan.vm_id, orphan.pid, orphan.adoptable) == ("kept", vm.id, vm.pid, True)
        again = await client.system.adopt_orphan(orphan.tag)
        assert (again.id, again.pid, again.status) == (vm.id, vm.pid, "running")
        await reachable(client, "kept")
        assert (await run(client, "kept", "hostname")).strip() == "kept"
        await refill(daemon, client)


async def refill(daemon: Daemon, client: Client) -> None:
    """A restarted daemon fills its pool once a template is used."""
    await boot(client, "again")
    await filled(daemon)


@pytest.mark.full
async def test_a_warm_process_that_hangs_is_replaced_unnoticed(daemon: Daemon) -> None:
    async with daemon.client() as client:
        (pid,), failed = await filled(daemon), await count(daemon, "failed_claims_total")
        os.kill(pid, signal.SIGSTOP)
        vm = await boot(client, "unlucky")
        assert (vm.booted_from, vm.fallback) == ("template", None)
        assert vm.pid != pid
        assert not is_alive(pid)
        assert await count(daemon, "failed_claims_total") == failed + 1
        await reachable(client, "unlucky")


@pytest.mark.full
async def test_with_a_disk(daemon: Daemon, image_cache: Path, tmp_path: Path) -> None:
    async with daemon.client() as client:
        manifest = plugin("disky", make_ext4(tmp_path / "root.ext4", image_cache))
        await client.plugins.install(manifest)
        await boot(client, "one", plugin="disky")
        built = await eventually(
            lambda: next(
                (each.parent for each in daemon.state_dir.glob(f"templates/{'[0-9a-f]' * 32}/root.qcow2")), None
            )
        )
        await boot(client, "two", plugin="disky")
        (pid,) = [each for each in await filled(daemon, 2) if _has_disk(each)]
        vm = await boot(client, "three", plugin="disky")
        assert (vm.pid, vm.booted_from) == (pid, "template")
        await run(client, "three", "mkdir", "/kept")
        await client.vms.restart("three")
        after = await until(client, "three", "running")
        assert after is not None
        assert after.booted_from == "cold"
        assert "kept" in await run(client, "three", "ls", "/")
        # The processes of a deleted template end, too.
        async with daemon.http() as http:
            assert built is not None
            await http.delete(f"/api/v1/templates/{built.name}")
        await eventually(lambda: not [p for p in waiting(daemon) if _has_disk(p)])


def _has_disk(pid: int) -> bool:
    return b"root-layer-file" in Path(f"/proc/{pid}/cmdline").read_bytes()
