"""What an attacker with control of a virtiofsd's process can do: all in its directory, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hypervisor.intruder import DENIED, PYTHON, tries
from tests.hypervisor.kit import passable_directory
from volant.directories import AllowedDirectory, Virtiofsd
from volant.host import Host, OpenDirectory, landlock_version
from volant.model import DirectoryMount

from .test_virtiofsd import USER, row

OWNER = 1234 if os.geteuid() == 0 else os.geteuid()
pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(PYTHON is None, reason="there is no Python where programs lie"),
    pytest.mark.skipif(landlock_version() == 0, reason="the kernel has no Landlock"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A place with a shared directory, one beside it, and an empty one to work in."""
    with passable_directory() as path:
        for name in ("shared", "shared/in", "beside", "empty"):
            (path / name).mkdir()
            (path / name).chmod(0o755)
            if name != "empty":
                (path / name / "file").write_text("x")
                for each in (path / name, path / name / "file"):
                    os.chown(each, OWNER, -1)
        yield path


async def attempts(place: Path, tasks: list[tuple[object, ...]], *, read_only: bool) -> dict[tuple[object, ...], str]:
    host = Host()
    virtiofsd = Virtiofsd(
        host=host,
        runtime_dir=place,
        instance="test",
        allowed=(AllowedDirectory(place / "shared", True),),
        user_of=lambda tag, vm_id: USER,
    )
    mount = DirectoryMount(source=str(place / "shared"), path="/data", read_only=read_only)
    opened: OpenDirectory = await host.descriptors.open_directory(place / "shared", place / "shared", 5)
    try:
        sandbox = virtiofsd._sandbox(row(virtiofsd), mount, opened)
        found, _ = await tries(host, f"volant-test.{host.random.new_id()}", place / "empty", sandbox, tasks)
    finally:
        host.descriptors.close(opened.fd)
    return found


def outside(place: Path) -> list[tuple[object, ...]]:
    beside = place / "beside"
    return [
        *(("read", str(path)) for path in (beside / "file", "/etc/passwd", "/proc/1/environ")),
        *(("list", str(path)) for path in (beside, place, "/", "/home", "/tmp")),
        ("append", str(beside / "file")),
        ("make", str(beside / "new")),
        ("kill", os.getpid()),
        ("tcp", 9),
        ("setuid",),
        ("chroot",),
        ("mount",),
        ("uring",),
    ]


async def test_a_guest_that_writes(place: Path) -> None:
    shared = place / "shared"
    may: list[tuple[object, ...]] = [
        ("read", str(shared / "file")),
        ("append", str(shared / "in/file")),
        ("list", str(shared / "in")),
        ("create", str(shared / "made"), 0o640),
        ("mode", str(shared / "made"), 0o755),
        ("mkdir", str(shared / "new")),
        ("move", str(shared / "made"), str(shared / "new/made")),
        ("link", str(shared / "way")),
        ("remove", str(shared / "new/made")),
        ("rmdir", str(shared / "new")),
    ]
    may_not: list[tuple[object, ...]] = [
        *(("mode", str(shared / "file"), mode) for mode in (0o4755, 0o2755)),
        ("create", str(shared / "setuid"), 0o4755),
        ("device", str(shared / "zero")),
        ("chown", str(shared / "file")),
        ("read", str(shared / "way")),
        ("move", str(shared / "file"), str(place / "beside/stolen")),
        *outside(place),
    ]
    found = await attempts(place, [*may, *may_not], read_only=False)
    assert {task: found[task] for task in may} == dict.fromkeys(may, "DONE")
    assert {task: result for task in may_not if (result := found[task]) not in DENIED} == {}
    assert not (shared / "setuid").exists()


async def test_a_guest_that_reads(place: Path) -> None:
    shared = place / "shared"
    may: list[tuple[object, ...]] = [("read", str(shared / "in/file")), ("list", str(shared))]
    may_not: list[tuple[object, ...]] = [
        ("append", str(shared / "file")),
        ("create", str(shared / "made"), 0o640),
        ("mode", str(shared / "file"), 0o600),
        ("remove", str(shared / "file")),
        ("mkdir", str(shared / "new")),
        *outside(place),
    ]
    found = await attempts(place, [*may, *may_not], read_only=True)
    assert {task: found[task] for task in may} == dict.fromkeys(may, "DONE")
    assert {task: result for task in may_not if (result := found[task]) not in DENIED} == {}


async def test_the_sandbox_is_of_the_directory_that_was_opened(place: Path) -> None:
    """Something else has its name by the time that virtiofsd starts."""
    host, shared = Host(), place / "shared"
    opened = await host.descriptors.open_directory(place, shared, 5)
    try:
        shared.rename(place / "moved")
        shared.symlink_to(place / "beside")
        assert os.fstat(opened.fd).st_ino == (place / "moved").stat().st_ino
        with pytest.raises(OSError, match="symbolic links"):
            await host.descriptors.open_directory(place, shared / "in", 5)
        with pytest.raises(OSError, match="symbolic links"):
            await host.descriptors.open_directory(place, shared, 5)
    finally:
        host.descriptors.close(opened.fd)
