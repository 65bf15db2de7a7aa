"""A real virtiofsd: it starts in its sandbox, serves one connection, and ends with it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import trio

from tests.hypervisor.kit import passable_directory
from volant.directories import AllowedDirectory, DirectoryFailed, Virtiofsd, directory_socket, find_program
from volant.host import Host
from volant.model import BASE, DirectoryMount, VmRow

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd"),
]

USER = 70000 if os.geteuid() == 0 else None
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def virtiofsd() -> AsyncIterator[Virtiofsd]:
    with passable_directory() as place:
        for name in ("run", "shared/data", "shared/drop"):
            (place / name).mkdir(parents=True, mode=0o711)
        host = Host()
        made = Virtiofsd(
            host=host,
            runtime_dir=place / "run",
            instance=f"test{host.random.new_id()[:6]}",
            allowed=(AllowedDirectory(place / "shared", True),),
            user_of=lambda tag, vm_id: USER,
        )
        yield made
        await made.end(7)


def row(virtiofsd: Virtiofsd, *names: str) -> VmRow:
    shared = virtiofsd.allowed[0].path
    mounts = tuple(DirectoryMount(source=f"{shared}/{name}", path=f"/{name}", read_only=False) for name in names)
    return VmRow(
        id=7, name="demo", cpu_cores=1, memory_mb=128, plugin="base", runtime="base", manifest=BASE,
        created_at=NOW, updated_at=NOW, directories=mounts,
    )  # fmt: skip


async def test_it_serves_one_connection_and_ends_with_it(virtiofsd: Virtiofsd) -> None:
    vm, host = row(virtiofsd, "data", "drop"), virtiofsd.host
    started = await virtiofsd.start(vm)
    assert len(started) == 2
    status = host.proc.status(started[0])
    assert (status.capabilities, status.no_new_privileges) == (0, True)
    assert USER is None or status.user == USER
    with trio.fail_after(20), host.processes.open(started[0]) as process:
        async with await host.sockets.connect_unix(directory_socket(virtiofsd.runtime_dir, 7, 0), 5):
            assert not process.exited
        assert await process.wait() == 0
        assert "data" in await virtiofsd.lost(vm)
    assert await virtiofsd.explain(row(virtiofsd, "data"), started[:1]) is None
    await virtiofsd.end(7)
    assert await host.processes.scan(f"volant-{virtiofsd.instance}-", of_anybody=True) == []
    assert host.files.names(virtiofsd.runtime_dir / "directories") == ["empty"]


async def test_one_that_can_not_serve_says_why(virtiofsd: Virtiofsd) -> None:
    shared = virtiofsd.allowed[0].path
    if USER is not None:
        shared.chmod(0o700)
    else:
        (shared / "data").chmod(0)
    vm = row(virtiofsd, "data")
    started = await virtiofsd.start(vm)
    with trio.fail_after(20):
        why = await virtiofsd.explain(vm, started)
    assert why is not None
    assert "ended with status 1; its last output: " in why
    shared.chmod(0o711)
    (shared / "data").chmod(0o711)


async def test_what_is_not_there_is_said_before_anything_starts(virtiofsd: Virtiofsd) -> None:
    with pytest.raises(DirectoryFailed) as failed:
        await virtiofsd.start(row(virtiofsd, "gone"))
    assert failed.value.code == "host_directory_missing"
    assert "does not exist" in str(failed.value)


async def test_a_process_of_another_user_with_the_same_tag_is_not_taken_for_it(virtiofsd: Virtiofsd) -> None:
    if USER is None:
        pytest.skip("needs root, to start a process of another user")
    command = ["sh", "-c", "sleep 100; :", f"volant-{virtiofsd.instance}-d.7.0"]
    process = await trio.lowlevel.open_process(command, user=1234, start_new_session=True)
    try:
        await virtiofsd.end(7)
        assert process.poll() is None
    finally:
        process.kill()
        await process.wait()
