"""Volumes outlive VMs, have one writer or many readers, grow while mounted, and their content is not trusted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kill_hypervisor, run, spec, until
from volant.client import Client, ClientProblem
from volant.model import CloneVolume, CreateVolume, VmView


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
    assert "not limited" not in daemon.log()


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
