"""Control groups limit a process, and report that the kernel has killed it for lack of memory."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from volant.host import Cgroups, Host, ResourceLimits, _cgroups
from volant.model import ProcessIdentity

BOUNDS = ResourceLimits(memory_mb=640, cpus=3, weight=200, tasks=258)


@pytest.fixture
def groups() -> Iterator[Cgroups]:
    """Of the machine itself."""
    found = _cgroups.own_cgroups(f"volant-test-{uuid.uuid4().hex[:10]}")
    if found is None:
        pytest.skip("there is no place for control groups here")
    yield found
    if found.directory.exists():
        found.remove_empty()
        found.directory.rmdir()


async def started(host: Host, tmp_path: Path) -> ProcessIdentity:
    tag = f"volant-test-{host.random.new_id()}"
    argv = [sys.executable, "-c", "import signal; signal.pause()", tag]
    return await host.processes.spawn(argv, tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out")


async def end(host: Host, identity: ProcessIdentity) -> None:
    with host.processes.open(identity) as process, trio.fail_after(10):
        process.kill(signal.SIGKILL)
        await process.wait()


async def test_the_group_of_an_exiting_process_is_awaited(groups: Cgroups, tmp_path: Path) -> None:
    host = Host(groups=groups)
    identity = await started(host, tmp_path)
    await host.limits.apply(identity, "VM one", BOUNDS)
    with trio.fail_after(10):
        await host.limits.remove_empty(identity.tag)
        assert (groups.directory / identity.tag).exists(), "it lives, and is not waited for without end"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.limits.remove_empty, identity.tag)
            await end(host, identity)
    assert not (groups.directory / identity.tag).exists()


async def test_a_process_has_a_group_of_its_own_that_is_removed_with_it(groups: Cgroups, tmp_path: Path) -> None:
    host = Host(groups=groups)
    first, second = await started(host, tmp_path), await started(host, tmp_path)
    assert host.limits.of(first) is None
    for _ in range(2):
        # Whoever adopts it does it once more.
        await host.limits.apply(first, "VM one", BOUNDS)
    await host.limits.apply(second, "VM two")
    assert _cgroups.group_of(first.pid) == groups.directory / first.tag
    assert _cgroups.group_of(second.pid) == groups.directory / second.tag
    assert _cgroups.group_of(os.getpid()) != groups.directory
    limits = host.limits.of(first)
    assert limits is not None
    # The controllers may be somebody else's; what is there is as it should be.
    assert (
        limits.items()
        <= {
            "memory.max": str(640 * 2**20),
            "cpu.max": "300000 100000",
            "cpu.weight": "200",
            "io.weight": "default 200",
            "pids.max": "258",
        }.items()
    )
    await end(host, first)
    await host.limits.remove_empty()
    assert not (groups.directory / first.tag).exists()
    # What a daemon finds that comes after one that was killed: those whose processes live stay, the others go.
    assert _cgroups.own_cgroups(groups.directory.name) == groups
    assert (groups.directory / second.tag).is_dir()
    await end(host, second)
    assert _cgroups.own_cgroups(groups.directory.name) == groups
    assert not groups.directory.exists()
    second = await started(host, tmp_path)
    await host.limits.apply(second, "VM two")
    await end(host, second)
    # Or as the next is made.
    third = await started(host, tmp_path)
    await host.limits.apply(third, "VM three", BOUNDS)
    assert [path.name for path in groups.directory.iterdir() if path.is_dir()] == [third.tag]
    await end(host, third)
    await host.limits.remove_empty()
    assert not groups.directory.exists()


async def test_limits_are_set_where_controllers_are_enabled(tmp_path: Path) -> None:
    """In a directory that looks like a group with all of them but the disk's."""
    group = tmp_path / "volant" / "demo"
    group.mkdir(parents=True)
    for name in ("memory.max", "cpu.max", "cpu.weight", "pids.max"):
        (group / name).touch()
    Cgroups(tmp_path / "volant").enclose(os.getpid(), "demo", BOUNDS)
    assert _cgroups.limits_in(group) == {
        "memory.max": "671088640", "cpu.max": "300000 100000", "cpu.weight": "200", "pids.max": "258",
    }  # fmt: skip
    assert (group / "cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / "cgroup.subtree_control").exists()


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        ("31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", (Path("/sys/fs/cgroup"), "/")),
        ("31 23 0:28 /a /my\\040groups rw shared:4 - cgroup2 none rw", (Path("/my groups"), "/a")),
        (
            "31 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
            "32 23 0:28 / /sys/fs/cgroup ro - cgroup2 none rw\n"
            "33 32 0:28 /volant.slice /sys/fs/cgroup/volant.slice rw - cgroup2 none rw",
            (Path("/sys/fs/cgroup"), "/"),
        ),
        ("31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", None),
        ("", None),
    ],
)
def test_the_hierarchy_is_found_where_it_is_mounted(mountinfo: str, found: object) -> None:
    assert _cgroups.mount_of(mountinfo) == found


def test_oom_kills_are_read_from_the_events_of_a_group() -> None:
    assert _cgroups.oom_kills("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n") == 2
    assert _cgroups.oom_kills("low 0\nmax 1\n") == 0
