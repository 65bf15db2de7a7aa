"""Directories of the host: a guest reads, or writes as their owner, and reaches nothing else of the host."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.system.kit import Daemon, boot, is_alive, kill_hypervisor, run, runs_on, spec, until
from volant.client import Client, ClientProblem
from volant.directories import find_program

pytestmark = [
    pytest.mark.cold,
    pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd"),
]

OWNER = 1234 if os.geteuid() == 0 else os.geteuid()
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another user")


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory whose part `drop` belongs to an ordinary user and may be written to."""
    root = Path(tempfile.mkdtemp(prefix="vd", dir="/tmp"))
    root.chmod(0o755)
    for name in ("data", "drop", "drop/sub"):
        (root / name).mkdir(mode=0o755)
        (root / name / "file").write_text(f"{name}\n")
        for path in (root / name, root / name / "file"):
            os.chown(path, OWNER if "drop" in name else -1, -1)
    (root / "data/secret").write_text("of root\n")
    (root / "data/secret").chmod(0o600)
    (root / "data/out").symlink_to("/etc/passwd")
    (root / "linked").symlink_to(root / "drop")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], shared: Path) -> Daemon:
    return make_daemon("--host-dirs", f"{shared},{shared}/drop:rw", ephemeral=False)


def virtiofsds(daemon: Daemon) -> list[int]:
    return [pid for pid, tag in daemon.processes().items() if tag.startswith(f"{daemon.tag_prefix}d.")]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


async def refused(client: Client, volume: str) -> ClientProblem:
    with pytest.raises(ClientProblem) as problem:
        await client.vms.create(spec("refused", volumes=(volume,)))
    return problem.value


async def fails(client: Client, vm: str, command: str) -> None:
    await run(client, vm, "sh", "-c", f"! ( {command} )")


async def test_a_guest_reads_a_directory_and_writes_where_it_may_as_its_owner(daemon: Daemon, shared: Path) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "demo", volumes=(f"{shared}/data:/data", f"{shared}/drop:/drop:rw"))
        assert vm.volumes == (f"{shared}/data:/data:ro", f"{shared}/drop:/drop:rw")
        assert await run(client, "demo", "cat", "/data/file", "/drop/sub/file") == "data\ndrop/sub\n"
        # The host changes it meanwhile. The guest keeps the attributes of a file for a second.
        (shared / "data/file").write_text("changed\n")
        await run(client, "demo", "sh", "-c", "until [ $(cat /data/file) = changed ]; do sleep 0.2; done")
        for command in ("echo x >/data/new", "rm /data/file", "mount -o remount,rw /data && echo x >/data/new"):
            await fails(client, "demo", command)
        assert sorted(path.name for path in (shared / "data").iterdir()) == ["file", "out", "secret"]

        script = "cd /drop; mkdir new; echo mine >new/a; mv new/a b; ln -s b link; chmod 640 b; rm -r new sub"
        await run(client, "demo", "sh", "-c", script)
        assert sorted(path.name for path in (shared / "drop").iterdir()) == ["b", "file", "link"]
        made = (shared / "drop/b").stat()
        assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (OWNER, 0o640)
        for command in ("chmod u+s /drop/b", "chmod 2755 /drop/b", "mknod /drop/zero c 1 5"):
            await fails(client, "demo", command)
        assert stat.S_IMODE((shared / "drop/b").stat().st_mode) == 0o640
        # Another user of the guest makes files only as the owner, whatever the mode of the directory is.
        (shared / "drop").chmod(0o777)
        for user, exit_code in ((OWNER, 0), (OWNER + 1, 1)):
            writes = ["sh", "-c", f"echo x >/drop/of-{user}"]
            async with client.vms.exec("demo", writes, user=str(user)) as process:
                async for _ in process:
                    pass
            assert process.end is not None
            assert process.end.exit_code == exit_code, (user, process.end)
        if os.geteuid() == 0:
            assert (shared / f"drop/of-{OWNER}").stat().st_uid == OWNER
        options = await run(client, "demo", "grep", "virtiofs", "/proc/mounts")
        assert all("nosuid,nodev" in line for line in options.splitlines())


async def test_a_guest_reaches_nothing_else_of_the_host(daemon: Daemon, shared: Path) -> None:
    async with daemon.client() as client:
        await boot(client, "demo", volumes=(f"{shared}/data:/data", f"{shared}/drop:/drop:rw"))
        # The guest follows the link in its own root.
        await fails(client, "demo", "grep daemon /data/out")
        await run(client, "demo", "sh", "-c", "ln -s /etc/passwd /drop/way; ln -s ../data/file /drop/up")
        await fails(client, "demo", "grep daemon /drop/way")
        if os.geteuid() == 0:
            await fails(client, "demo", "cat /data/secret")
        for pid in virtiofsds(daemon):
            status = status_of(pid)
            assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert (status["NoNewPrivs"], int(status["Seccomp_filters"]) >= 2) == ("1", True)
            assert os.geteuid() != 0 or status["Uid"].split()[0] != "0"


async def test_only_what_the_operator_allows_can_be_named(
    daemon: Daemon, make_daemon: Callable[..., Daemon], shared: Path
) -> None:
    async with daemon.client() as client:
        for volume, status, why in (
            ("/etc:/etc-of-host", 403, "VOLANT_HOST_DIRS=/etc"),
            (f"{shared}/data:/data:rw", 403, f"VOLANT_HOST_DIRS={shared}:rw"),
            (f"{shared}/drop/../../etc:/data", 400, "without '.' or '..'"),
            (f"{shared}/linked:/data", 409, "symbolic link"),
            (f"{shared}/linked/sub:/data", 409, "symbolic link"),
            (f"{shared}/data/file:/data", 409, "not a directory"),
            (f"{shared}/nothing:/data", 409, "does not exist"),
        ):
            problem = await refused(client, volume)
            assert (problem.status, why in f"{problem} {problem.hint}") == (status, True), (volume, problem)
    daemon.stop()
    async with make_daemon().client() as client:
        problem = await refused(client, f"{shared}/data:/data")
        assert (problem.status, "none is allowed" in str(problem)) == (403, True)


@pytest.mark.full
async def test_a_vm_with_a_directory_is_not_copied_and_boots_again(daemon: Daemon, shared: Path) -> None:
    async with daemon.client() as client:
        await boot(client, "demo", volumes=(f"{shared}/data:/data",))
        for copy in (client.vms.fork("demo", {"names": ["twin"]}), client.snapshots.take("demo", {"name": "s"})):
            with pytest.raises(ClientProblem) as problem:
                await copy
            assert (problem.value.status, f"{shared}/data" in str(problem.value)) == (409, True)
        await client.vms.stop("demo")
        await until(client, "demo", "stopped")
        assert virtiofsds(daemon) == []
        moved = (shared / "data").rename(shared / "moved")
        with pytest.raises(ClientProblem) as problem:
            await client.vms.start("demo")
        assert (problem.value.status, "does not exist" in str(problem.value)) == (409, True)
        moved.rename(shared / "data")
        await client.vms.start("demo")
        await until(client, "demo", "running")
        assert await run(client, "demo", "ls", "/data")


@pytest.mark.full
async def test_a_killed_daemon_keeps_directories_and_a_killed_virtiofsd_crashes_the_vm(
    daemon: Daemon, shared: Path
) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "demo", volumes=(f"{shared}/data:/data",))
    daemon.kill()
    async with daemon.started() as client:
        await runs_on(client, vm)
        (shared / "data/later").write_text("later\n")
        assert await run(client, "demo", "cat", "/data/later") == "later\n"
        [pid] = virtiofsds(daemon)
        os.kill(pid, signal.SIGKILL)
        after = await until(client, "demo", "crashed")
        assert after is not None
        assert after.reason is not None
        assert (after.reason.code, f"{shared}/data" in after.reason.message) == ("host_directory_lost", True)
        await client.vms.start("demo")
        again = await until(client, "demo", "running")
        assert again is not None
        # It ends with its hypervisor, and that is not what the VM crashed of.
        [pid] = virtiofsds(daemon)
        kill_hypervisor(again)
        after = await until(client, "demo", "crashed")
        assert after is not None
        assert after.reason is not None
        assert after.reason.code == "hypervisor_killed"
        with trio.fail_after(10):
            while is_alive(pid):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.05)
