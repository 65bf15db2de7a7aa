"""Processes that wait for a VM become that VM, and are nobody's for as long as they wait."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, is_alive, kept, run, until
from tests.system.test_templates import template, who


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
