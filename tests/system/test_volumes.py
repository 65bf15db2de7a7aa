"""Volumes outlive VMs, have one writer or many readers, grow while mounted, and their content is not trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kill_hypervisor, patched, run, runs_on, spec, until
from tests.system.rootfs import make_ext4, plugin
from tests.system.test_full_disk import SmallDisk, small_state_disk
from volant.client import Client, ClientError, ClientProblem, LogLine
from volant.model import CloneVolume, CreateVolume, RestoreVm, TakeSnapshot, VmView


async def made(client: Client, name: str, size_mb: int = 64) -> None:
    await client.volumes.create(CreateVolume(name=name, size_mb=size_mb))


async def volume_mb(client: Client, vm: str, path: str) -> int:
    """The size that the guest sees of a filesystem."""
    line = (await run(client, vm, "df", "-m", path)).splitlines()[-1]
    return int(line.split()[1])


async def crashed(client: Client, name: str, **fields: object) -> VmView:
    await client.vms.create(spec(name, **fields))
    vm = await until(client, name, "crashed")
    assert vm is not None
    assert vm.reason is not None
    return vm


async def refused(client: Client, name: str, *volumes: str) -> ClientProblem:
    with pytest.raises(ClientProblem) as problem:
        await client.vms.create(spec(name, volumes=volumes))
    return problem.value


def repair(daemon: Daemon, volume: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "volant.cli.main", "volumes", "repair", volume],
        capture_output=True,
        text=True,
        timeout=BOOT_S,
        check=False,
        env={**daemon.environ, "VOLANT_API_BASE": daemon.base_url},
    )


async def test_a_volume_outlives_its_vm_and_has_one_writer_or_many_readers(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await made(client, "data")
        await boot(client, "writer", volumes=("data:/var/lib/app",))
        await run(client, "writer", "sh", "-c", "echo kept >/var/lib/app/file")
        for volumes in ("data:/d", "data:/d:ro"):
            problem = await refused(client, "other", volumes)
            assert (problem.status, "writer" in str(problem)) == (409, True)
        await client.vms.delete("writer")
        await boot(client, "one", volumes=("data:/srv/www:ro",))
        await boot(client, "two", volumes=("data:/d:ro",))
        assert await run(client, "one", "cat", "/srv/www/file") == "kept\n"
        assert await run(client, "two", "cat", "/d/file") == "kept\n"
        await run(client, "two", "sh", "-c", "! echo x >/d/file")
        assert (await refused(client, "other", "data:/d")).status == 409
        # Readers can be copied; a copy has the mount, and is one more reader.
        await client.vms.fork("one", {"names": ["twin"]})
        await until(client, "twin", "running")
        assert await run(client, "twin", "cat", "/srv/www/file") == "kept\n"
        for name in ("one", "two", "twin"):
            await client.vms.delete(name)
        await client.volumes.delete("data")


async def test_a_volume_grows_while_it_is_mounted_and_is_copied_when_it_is_not(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await made(client, "data")
        await boot(client, "demo", volumes=("data:/data",), disk_iops=2000, disk_mbps=100)
        await run(client, "demo", "sh", "-c", "echo mine >/data/file")
        before = await volume_mb(client, "demo", "/data")
        assert before < 64
        await client.volumes.resize("data", 256)
        assert 3 * before < await volume_mb(client, "demo", "/data") < 256
        with pytest.raises(ClientProblem) as written:
            await client.volumes.clone("data", CloneVolume(name="copy"))
        assert (written.value.status, "demo" in str(written.value)) == (409, True)
        with pytest.raises(ClientProblem) as used:
            await client.volumes.delete("data")
        assert (used.value.status, "demo" in str(used.value)) == (409, True)
        await client.vms.stop("demo")
        await until(client, "demo", "stopped")
        await client.volumes.clone("data", CloneVolume(name="copy"))
        await client.volumes.resize("copy", 512)
        await client.vms.start("demo")
        await until(client, "demo", "running")
        await boot(client, "other", volumes=("copy:/copy",))
        assert await run(client, "other", "cat", "/copy/file") == "mine\n"
        assert await volume_mb(client, "other", "/copy") > 400
        # A hypervisor dies with the filesystem mounted: who only reads it can't replay its journal, `repair` does.
        kill_hypervisor(await client.vms.get("other"))
        await until(client, "other", "crashed")
        # What a process had is released once nothing of it is left.
        with trio.fail_after(BOOT_S):
            while (await client.volumes.get("copy")).writer is not None:  # noqa: ASYNC110 - of the daemon
                await trio.sleep(0.02)
        reader = await crashed(client, "reader", volumes=("copy:/d:ro",))
        assert reader.reason is not None
        assert (reader.reason.code, "volumes repair copy" in reader.reason.message) == ("volume_not_clean", True)
        done = await trio.to_thread.run_sync(repair, daemon, "copy")
        assert (done.returncode, done.stdout, done.stderr) == (0, "volume copy can be read\n", "")
        await client.vms.start("reader")
        await until(client, "reader", "running")
        assert await run(client, "reader", "cat", "/d/file") == "mine\n"
        for name in ("demo", "other", "reader"):
            await client.vms.delete(name)
        for name in ("data", "copy"):
            await client.volumes.delete(name)


@pytest.mark.full
async def test_a_snapshot_has_the_volumes_as_they_were_with_the_memory(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await made(client, "data")
        await boot(client, "demo", volumes=("data:/d",))
        # Not synced: a part of it is only in the guest's memory.
        await run(client, "demo", "sh", "-c", "echo first >/d/file")
        with pytest.raises(ClientProblem) as problem:
            await client.snapshots.take("demo", TakeSnapshot(name="then"))
        assert problem.value.code == "volume-written"
        assert "--volumes" in str(problem.value.hint)
        taken = await client.snapshots.take("demo", TakeSnapshot(name="then", volumes=True))
        assert taken.volumes == ("data",)
        await run(client, "demo", "sh", "-c", "echo second >/d/file; sync")

        for name in ("one", "two"):
            await client.vms.create(RestoreVm(name=name, from_snapshot="then"))
            vm = await until(client, name, "running")
            assert vm is not None
            assert (vm.booted_from, vm.volumes) == ("snapshot", (f"{name}-data:/d",))
            assert await run(client, name, "cat", "/d/file") == "first\n"
            await run(client, name, "sh", "-c", f"echo {name} >/d/file; sync")
        assert await run(client, "demo", "cat", "/d/file") == "second\n"
        await client.vms.restart("one")
        await until(client, "one", "running")
        assert await run(client, "one", "cat", "/d/file") == "one\n"

        # A name that is taken is refused, and nothing is left.
        await made(client, "three-data")
        with pytest.raises(ClientProblem) as problem:
            await client.vms.create(RestoreVm(name="three", from_snapshot="then"))
        assert (problem.value.status, "three-data" in str(problem.value)) == (409, True)
        assert sorted(volume.name for volume in await client.volumes.list()) == [
            "data", "one-data", "three-data", "two-data",
        ]  # fmt: skip
        [copy] = (daemon.state_dir / "snapshots").glob("*/*.img")
        copy.unlink()
        with pytest.raises(ClientProblem) as problem:
            await client.vms.create(RestoreVm(name="four", from_snapshot="then"))
        assert (problem.value.status, copy.name in str(problem.value)) == (503, True)
        assert len(await client.volumes.list()) == 4
        for name in ("demo", "one", "two"):
            await client.vms.delete(name)
        await client.snapshots.delete("then")
        assert not list((daemon.state_dir / "snapshots").iterdir())
        for volume in await client.volumes.list():
            await client.volumes.delete(volume.name)


COPIES_BUT_GOES_NO_FURTHER = """
import trio
from volant.volumes import Volumes
begin = Volumes.begin_copy
async def hang(self, name, source):
    await begin(self, name, source)
    print("copied", name.name, file=sys.stderr, flush=True)
    await trio.sleep_forever()
change(Volumes, "begin_copy", hang)
"""


@pytest.mark.full
async def test_a_killed_daemon_leaves_no_copy_of_a_volume_without_its_vm(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        await made(client, "data")
        await boot(client, "demo", volumes=("data:/d",))
        await client.snapshots.take("demo", TakeSnapshot(name="then", volumes=True))
    assert daemon.stop() == 0
    whole = daemon.command
    daemon.command = [*patched(COPIES_BUT_GOES_NO_FURTHER), *whole]
    daemon.start()
    async with trio.open_nursery() as nursery:

        async def restore() -> None:
            async with daemon.client() as client:
                with suppress(ClientError):
                    await client.vms.create(RestoreVm(name="copy", from_snapshot="then"))

        nursery.start_soon(restore)
        with trio.fail_after(BOOT_S):
            while "copied copy-data" not in daemon.log():  # noqa: ASYNC110 - another process's log
                await trio.sleep(0.05)
        daemon.kill()
        nursery.cancel_scope.cancel()
    assert len(list((daemon.state_dir / "volumes").iterdir())) == 2
    daemon.command = whole
    daemon.start()
    async with daemon.client() as client:
        with trio.fail_after(BOOT_S):
            while len(await client.volumes.list()) > 1:  # noqa: ASYNC110 - it is removed in the background
                await trio.sleep(0.05)
            while len(list((daemon.state_dir / "volumes").iterdir())) > 1:  # noqa: ASYNC110
                await trio.sleep(0.05)
        # The same request makes what it asked for.
        await client.vms.create(RestoreVm(name="copy", from_snapshot="then"))
        await until(client, "copy", "running")


@pytest.mark.full
async def test_a_killed_daemon_loses_no_volume(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        await made(client, "data")
        vm = await boot(client, "demo", volumes=("data:/data",))
        await run(client, "demo", "sh", "-c", "echo kept >/data/file; sync")
    daemon.kill()
    left = daemon.state_dir / "volumes" / "0123456789abcdef.img.new"
    left.write_bytes(b"half")
    async with daemon.started() as client:
        await runs_on(client, vm)
        assert not left.exists()
        assert (await refused(client, "other", "data:/d")).status == 409
        await client.volumes.resize("data", 128)
        assert await volume_mb(client, "demo", "/data") > 64
        # The hypervisor dies with the filesystem mounted: the next writer replays the journal, a reader can't.
        daemon.kill()
        kill_hypervisor(vm)
    async with daemon.started() as client:
        await until(client, "demo", "crashed")
        reader = await crashed(client, "reader", volumes=("data:/d:ro",))
        assert reader.reason is not None
        assert (reader.reason.code, "volumes repair data" in reader.reason.message) == ("volume_not_clean", True)
        assert reader.boots == 0, "no process starts for it"
        done = await trio.to_thread.run_sync(repair, daemon, "data")
        assert (done.returncode, done.stdout, done.stderr) == (0, "volume data can be read\n", "")
        assert {vm.name for vm in await client.vms.list()} == {"demo", "reader"}
        await client.vms.start("reader")
        await until(client, "reader", "running")
        assert await run(client, "reader", "cat", "/d/file") == "kept\n"
        in_use = await trio.to_thread.run_sync(repair, daemon, "data")
        assert (in_use.returncode, "'reader' reads it" in in_use.stderr) == (4, True)
        await client.vms.delete("reader")
        await client.vms.start("demo")
        await until(client, "demo", "running")
        assert await run(client, "demo", "cat", "/data/file") == "kept\n"
        await client.vms.delete("demo")
        await boot(client, "reader", volumes=("data:/d:ro",))
        assert await run(client, "reader", "cat", "/d/file") == "kept\n"
        await client.vms.delete("reader")
        await client.volumes.delete("data")


@pytest.mark.parametrize(("at", "why"), [(1024, "its superblock is not there"), (4096, "no sound ext4 filesystem")])
async def test_damaged_content_fails_the_boot_with_a_reason(daemon: Daemon, at: int, why: str) -> None:
    async with daemon.client() as client:
        await made(client, "data")
        [file] = (daemon.state_dir / "volumes").iterdir()
        with file.open("r+b") as writing:
            writing.seek(at)
            writing.write(b"\xa5" * (4096 if at == 4096 else 1024))
        vm = await crashed(client, "demo", volumes=("data:/data",))
        assert vm.reason is not None
        assert (vm.reason.code, why in vm.reason.message) == ("volume_failed", True), vm.reason
        await client.vms.delete("demo")
        file.unlink()
        vm = await crashed(client, "demo", volumes=("data:/data",))
        assert vm.reason is not None
        assert vm.reason.code == "volume_missing"
        await client.vms.delete("demo")
        await client.volumes.delete("data")


@pytest.mark.full
async def test_links_in_the_root_do_not_lead_out_of_it(daemon: Daemon, image_cache: Path, tmp_path: Path) -> None:
    async with daemon.client() as client:
        await client.plugins.install(plugin("linked", make_ext4(tmp_path / "linked.ext4", image_cache)))
        await made(client, "data")
        await boot(client, "demo", plugin="linked", volumes=("data:/app/data",))
        await run(client, "demo", "/bin/busybox", "touch", "/app/data/file")
        await run(client, "demo", "/bin/busybox", "umount", "/app/data")
        await run(client, "demo", "/bin/busybox", "rm", "-r", "/app")
        await run(client, "demo", "/bin/busybox", "ln", "-s", "../../../../bin", "/app")
        await client.vms.restart("demo")
        await until(client, "demo", "running")
        assert "file" in await run(client, "demo", "ls", "/bin/data")
        assert "/mnt/bin/data" in await run(client, "demo", "cat", "/proc/1/mounts")
        await client.vms.delete("demo")
        await client.volumes.delete("data")


@pytest.mark.full
async def test_all_disks_of_a_vm_share_its_limit(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await made(client, "data")
        await boot(client, "demo", volumes=("data:/data",), disk_mbps=2)
        write = ("dd", "if=/dev/zero", "of=/data/file", "bs=1M", "count=12", "conv=fsync")
        began = trio.current_time()
        await run(client, "demo", *write)
        assert trio.current_time() - began > 4
        await client.vms.delete("demo")
        await client.volumes.delete("data")
    assert "not limited" not in daemon.log()


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_full_host_is_an_error_in_the_guest_with_a_reason(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False, wrapper=small_state_disk(300))
    disk = SmallDisk(daemon)
    async with daemon.client() as client:
        await made(client, "data", 128)
        vm = await boot(client, "demo", volumes=("data:/data",))
        # On a full disk no command starts, as it could not be recorded.
        write = "! dd if=/dev/zero of=/data/file bs=1M count=64 conv=fsync"
        async with client.vms.exec_session("demo", ("sh", "-c", f"read go && {write}")) as session:
            disk.fill()
            with trio.fail_after(120):
                await session.send(b"go\n")
                async for _ in session:
                    pass
        assert session.end is not None
        assert session.end.exit_code == 0, session.end
        assert (await client.vms.get("demo")).pid == vm.pid
        async with client.vms.logs("demo", follow=False) as feed:
            said = [line.line async for line in feed if isinstance(line, LogLine)]
        assert any("the host can't write to its volume" in line and "No space left" in line for line in said), said
        disk.make_room()
        await client.vms.restart("demo")
        await until(client, "demo", "running")
        await run(client, "demo", "dd", "if=/dev/zero", "of=/data/file", "bs=1M", "count=16", "conv=fsync")
