"""A copy of a running guest continues from its state with a new identity; the original does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, event_of, kept, run, until
from volant.client import Client, LogLine
from volant.model import ForkVm, RestoreVm, TakeSnapshot, VmView

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /run/next; mv /run/next /run/count; sleep 0.5; done"


@pytest.fixture(scope="module")
def shared(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    with kept(Daemon(image_cache, ephemeral=False), _running) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    yield shared
    if not shared.runs:
        shared.start()
    shared.delete_vms()
    with httpx.Client(base_url=shared.base_url, trust_env=False, timeout=30) as client:
        for snapshot in client.get("/api/v1/snapshots").json():
            client.delete(f"/api/v1/snapshots/{snapshot['name']}").raise_for_status()
    assert checkpoints(shared) == []
    assert shared.leftovers() == []


def checkpoints(daemon: Daemon) -> list[str]:
    """Returns the files of copies of guests."""
    found = [*daemon.memory_dir.glob("fork-*"), *daemon.memory_dir.glob("snapshot-*")]
    return sorted(path.name for path in [*found, *(daemon.state_dir / "snapshots").glob("*")])


async def no_checkpoints(daemon: Daemon) -> None:
    """Waits until the daemon has removed the files that copies no longer need, shortly after they run."""
    with trio.fail_after(30):
        while checkpoints(daemon):  # noqa: ASYNC110 - another process's files
            await trio.sleep(0.02)


async def fork(client: Client, name: str, count: int = 1) -> list[VmView]:
    """Forks a VM; returns the running copies."""
    made = []
    for copy in await client.vms.fork(name, ForkVm(count=count)):
        vm = await until(client, copy.name, "running")
        assert vm is not None
        made.append(vm)
    return made


async def count(client: Client, name: str) -> int:
    return int(await run(client, name, "cat", "/run/count"))


async def counts_on(client: Client, name: str, beyond: int) -> None:
    """Waits until the count is higher than `beyond`: the guest is not paused."""
    with trio.fail_after(60):
        while await count(client, name) <= beyond:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def begin_to_count(client: Client, name: str) -> None:
    await run(client, name, "sh", "-c", f"({COUNT}) >/dev/null 2>&1 &")
    with trio.fail_after(30):
        while not (await run(client, name, "sh", "-c", "cat /run/count 2>/dev/null || true")).strip():  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_forks_continue_from_the_originals_state_and_the_original_keeps_its_own(daemon: Daemon) -> None:
    async with daemon.client() as client:
        before = await boot(client, "demo", labels={"team": "a"})
        await begin_to_count(client, "demo")
        await run(client, "demo", "sh", "-c", "echo before > /before")
        async with (
            client.vms.exec_session("demo", ["sh", "-c", "while read line; do echo got $line; done"]) as session,
            client.events(vm="demo") as events,
            client.vms.logs("demo", tail=0, follow=True, streams=["console"]) as log,
        ):
            await session.send(b"one\n")
            assert b"got one" in await said(session)
            counted = await count(client, "demo")
            copies = await fork(client, "demo", 2)
            await session.send(b"two\n")
            assert b"got two" in await said(session)
            await run(client, "demo", "sh", "-c", "echo still here > /dev/console")
            with trio.fail_after(30):
                async for item in log:
                    if isinstance(item, LogLine) and "still here" in item.line:
                        break
            told = await event_of(events, "VM_FORKED", "demo")
            assert (told.copies, told.status) == (("demo-fork-1", "demo-fork-2"), "running")
        await run(client, "demo", "sh", "-c", "echo after > /after")
        after = await client.vms.get("demo")
        assert (after.pid, after.boots, after.status) == (before.pid, before.boots, "running")
        ids = set()
        for copy in copies:
            assert copy.origin is not None
            assert (copy.booted_from, copy.origin.kind, copy.origin.vm, copy.labels) == (
                "fork", "fork", "demo", {"team": "a"},
            )  # fmt: skip
            assert copy.origin.paused_ms is not None
            assert copy.origin.paused_ms > 0
            assert (await run(client, copy.name, "cat", "/before")).strip() == "before"
            assert (await run(client, copy.name, "ls", "/")).split().count("after") == 0
            first = await count(client, copy.name)
            assert first >= counted
            await counts_on(client, copy.name, first)
            who = (await run(client, copy.name, "cat", "/proc/sys/kernel/hostname", "/etc/machine-id")).split()
            assert who[0] == copy.name
            ids.add(who[1])
        assert len(ids) == 2
        # Nobody needs the checkpoint any more, and no copy is harmed by its end.
        await no_checkpoints(daemon)
        assert (await fork(client, copies[0].name))[0].status == "running"


async def said(session: object) -> bytes:
    data = b""
    with trio.fail_after(30):
        while not data.endswith(b"\n"):
            piece = await session.__anext__()  # type: ignore[attr-defined]
            data += piece.data
    return data


async def test_a_snapshot_outlives_its_vm_and_the_daemon(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
        await begin_to_count(client, "demo")
        await run(client, "demo", "sh", "-c", "echo before > /before")
        counted = await count(client, "demo")
        taken = await client.snapshots.take("demo", TakeSnapshot(name="warm", description="before it breaks"))
        assert (taken.name, taken.status, taken.vm, taken.disk) == ("warm", "ready", "demo", "none")
        assert taken.size_bytes > 2**20
        await run(client, "demo", "sh", "-c", "echo after > /after")
        await client.vms.delete("demo")
    assert daemon.stop() == 0
    async with daemon.started() as client:
        assert [one.name for one in await client.snapshots.list()] == ["warm"]
        async with client.events(vm="again") as events:
            waited = await client.vms.create_and_wait(RestoreVm(name="again", from_snapshot="warm"), timeout_s=BOOT_S)
            vm = waited.vm
            assert vm is not None
            assert (vm.status, vm.booted_from) == ("running", "snapshot"), vm
            assert (await event_of(events, "VM_RESTORED", "again")).snapshot == "warm"
        assert (await run(client, "again", "cat", "/before")).strip() == "before"
        assert "after" not in (await run(client, "again", "ls", "/")).split()
        assert await count(client, "again") >= counted
        # A VM restored from it has it in memory, even if the snapshot is deleted.
        await client.snapshots.delete("warm")
        assert await count(client, "again") >= counted
        # Its next boot is an ordinary one.
        again = await client.vms.apply_and_wait("again", "restart", ["running"], timeout_s=BOOT_S)
        assert again.vm is not None
        assert (again.vm.booted_from, again.vm.status) == ("cold", "running")
        assert "before" not in (await run(client, "again", "ls", "/")).split()
