"""A VM with a root filesystem: commands run in it, it survives stops and crashes, and belongs to this VM alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kill_hypervisor, reachable, run, spec, until
from tests.system.rootfs import digest, hypervisor_arguments, is_clean, layer_of, make_ext4, plugin
from volant.client import Client, ClientProblem
from volant.images import artifact_path, find
from volant.model import Artifact, Boot, HealthCheck, Manifest, Reason, VmView, Workload

FILES = {
    "etc/passwd": "root:x:0:0::/:/none\nweb:x:33:34::/:/none\n",
    "etc/group": "root:x:0:\nwww:x:34:\nextra:x:40:other,web\n",
    "www/hello": "from the root filesystem\n",
}
SITE = Workload(
    entrypoint=("/bin/httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"),
    port=8080,
    health_check=HealthCheck(command=("/bin/grep", "-q", "root", "/www/hello")),
)


@pytest.fixture(scope="module")
def rootfs(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ext4(tmp_path_factory.mktemp("rootfs") / "site.ext4", image_cache, files=FILES)


async def crashed(client: Client, name: str) -> Reason:
    vm = await until(client, name, "crashed")
    assert vm is not None
    assert vm.reason is not None
    print(vm.reason.code, "|", vm.reason.message)
    return vm.reason


async def start(client: Client, name: str) -> VmView:
    await client.vms.start(name)
    vm = await until(client, name, "running")
    assert vm is not None
    return vm


async def test_a_vm_runs_on_a_root_filesystem(daemon: Daemon, image_cache: Path, rootfs: Path) -> None:
    """The root filesystem has no shell, and needs none."""
    base = artifact_path(image_cache, digest(rootfs))
    async with daemon.client() as client, daemon.http() as http:
        await client.plugins.install(plugin("site", rootfs, workload=SITE))
        vm = await boot(client, "one", plugin="site")
        assert vm.disk == "overlay"
        # A hypervisor with a user of its own boots from it, and no other user can read it.
        assert base.stat().st_mode & 0o007 == 0
        assert (await client.vms.get("one")).disk == "overlay"

        # The workload, its health check and commands run in it.
        with trio.fail_after(30):
            while (await client.vms.agent_health("one"))["workload"]["state"] != "healthy":  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert (await http.get("/api/v1/vms/one/agent/hello")).text == FILES["www/hello"]
        assert await run(client, "one", "cat", "/etc/passwd") == FILES["etc/passwd"]
        mounts = {
            line.split()[1]: line.split()[2] for line in (await run(client, "one", "cat", "/proc/mounts")).splitlines()
        }
        assert {mount: mounts[mount] for mount in ("/", "/proc", "/dev", "/run", "/tmp")} == {
            "/": "ext4", "/proc": "proc", "/dev": "devtmpfs", "/run": "tmpfs", "/tmp": "tmpfs",
        }  # fmt: skip
        kept = json.loads(await run(client, "one", "cat", "/run/volant-manifest.json"))
        assert (kept["name"], tuple(kept["workload"]["entrypoint"])) == ("site", SITE.entrypoint)
        assert await ended(client, "one", "sh") == "not_found"
        assert await ended(client, "one", "id", cwd="/usr") == "no_such_directory"
        assert await ended(client, "one", "id", user="nobody") == "no_such_user"
        assert await said(client, "one", "id", user="web") == "uid=33(web) gid=34(www) groups=40(extra)\n"
        assert await said(client, "one", "pwd", cwd="/www") == "/www\n"

        # Data survives stop and start, and after a sync also the death of the hypervisor.
        await run(client, "one", "mkdir", "/kept")
        await client.vms.stop("one")
        await until(client, "one", "stopped")
        assert await trio.to_thread.run_sync(is_clean, layer_of(daemon.disks()[0]))
        vm = await start(client, "one")
        assert "kept" in (await run(client, "one", "ls", "/")).split()
        await run(client, "one", "mkdir", "/synced")
        await run(client, "one", "sync")
        kill_hypervisor(vm)
        assert (await crashed(client, "one")).code == "hypervisor_killed"
        await start(client, "one")
        assert {"kept", "synced"} <= set((await run(client, "one", "ls", "/")).split())

        # Another VM has its own copy.
        await client.vms.stop("one")
        await until(client, "one", "stopped")
        await boot(client, "two", plugin="site")
        assert not {"kept", "synced"} & set((await run(client, "two", "ls", "/")).split())
        assert len(daemon.disks()) == 2

        await client.vms.delete("one")
        await client.vms.delete("two")
        assert daemon.disks() == []
        assert digest(base) == digest(rootfs)
        await client.plugins.delete("site")


async def said(client: Client, name: str, *command: str, **how: str) -> str:
    async with client.vms.exec(name, command, **how) as process:  # type: ignore[arg-type]  # user and cwd are text
        return b"".join([piece.data async for piece in process]).decode()


async def ended(client: Client, name: str, *command: str, **how: str) -> str | None:
    async with client.vms.exec(name, command, **how) as process:  # type: ignore[arg-type]  # user and cwd are text
        assert [piece async for piece in process] == []
    assert process.end is not None
    return process.end.code


@pytest.fixture
def nonsense(tmp_path: Path) -> Path:
    path = tmp_path / "nonsense"
    path.write_bytes(b"#!" * 2**20)
    return path


@pytest.fixture
def broken(tmp_path: Path, rootfs: Path) -> Path:
    """Writes a file with a superblock and nothing valid after it."""
    path = tmp_path / "broken"
    data = bytearray(rootfs.read_bytes())
    data[2048 : 2**20] = os.urandom(2**20 - 2048)
    path.write_bytes(data)
    return path


@pytest.mark.full
async def test_a_root_filesystem_that_cannot_boot_is_named(
    daemon: Daemon, rootfs: Path, nonsense: Path, broken: Path
) -> None:
    async with daemon.client() as client:
        # The error does not tell whether the file exists.
        for artifact in (Artifact(f"file://{rootfs}", "5" * 64), Artifact("/nowhere/x", "5" * 64)):
            with pytest.raises(ClientProblem) as refused:
                await client.plugins.install(plugin("none", artifact))
            assert (refused.value.code, refused.value.field) == ("artifact-unavailable", "boot.rootfs.url")
            assert artifact.url in refused.value.detail
            assert "there is no file that may be read and has this SHA-256" in refused.value.detail
        for name, image, code, words in (
            ("nonsense", nonsense, "rootfs_failed", ("no ext4",)),
            ("broken", broken, "rootfs_failed", ("EXT4-fs (vda)",)),
        ):
            await client.plugins.install(plugin(name, image))
            vm = await client.vms.create(spec(name, plugin=name))
            assert vm.status == "pending"
            reason = await crashed(client, name)
            assert reason.code == code
            assert all(word in reason.message for word in words), reason.message
            await client.vms.delete(name)
            await client.plugins.delete(name)


@pytest.mark.full
async def test_kernel_and_initramfs_come_from_the_manifest(daemon: Daemon, image_cache: Path) -> None:
    image = find(image_cache)
    assert image is not None
    own = Boot(
        kernel=Artifact(str(image.kernel), digest(image.kernel)),
        initramfs=Artifact(f"file://{image.initramfs}", digest(image.initramfs)),
    )
    async with daemon.client() as client:
        await client.plugins.install(Manifest(name="own", boot=own))
        vm = await boot(client, "own", plugin="own")
        assert vm.disk == "none"
        assert (await client.vms.inspect("own"))["image"] == "custom"
        assert vm.pid is not None
        arguments = hypervisor_arguments(vm.pid)
        for artifact, option in ((own.kernel, "-kernel"), (own.initramfs, "-initrd")):
            assert artifact is not None
            assert arguments[arguments.index(option) + 1] == str(artifact_path(image_cache, artifact.sha256))
        await client.vms.delete("own")
        await client.plugins.delete("own")


@pytest.mark.full
async def test_a_daemon_that_was_killed_finds_the_disks_again(make_daemon: Callable[..., Daemon], rootfs: Path) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        await client.plugins.install(plugin("site", rootfs))
        await boot(client, "one", plugin="site")
        await run(client, "one", "mkdir", "/kept")
    daemon.kill()
    stray = daemon.state_dir / "disks/9-stray"
    stray.mkdir()
    async with daemon.started() as client:
        await reachable(client, "one")
        assert "kept" in (await run(client, "one", "ls", "/")).split()
        # An orphaned disk is listed, and not deleted.
        assert (await client.system.info())["orphans"] == [{"disk": str(stray)}]
        stray.rmdir()

        # A disk that disappeared is not silently replaced by an empty one.
        await client.vms.stop("one")
        await until(client, "one", "stopped")
        layer = layer_of(daemon.disks()[0])
        layer.rename(layer.with_name("aside"))
        await client.vms.start("one")
        assert (await crashed(client, "one")).code == "disk_missing"
        layer.with_name("aside").rename(layer)
        await client.vms.start("one")
        await until(client, "one", "running", timeout_s=BOOT_S)
        assert "kept" in (await run(client, "one", "ls", "/")).split()


@pytest.mark.full
async def test_after_an_upgrade_an_installed_plugin_boots_from_what_is_cached(
    make_daemon: Callable[..., Daemon], rootfs: Path, tmp_path: Path
) -> None:
    """An earlier version cached files that all users can read, and its manifests name files that are not read now."""
    source = tmp_path / "site.ext4"
    shutil.copy(rootfs, source)
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        await client.plugins.install(plugin("site", source))
        cache = Path((await client.system.info())["cache_dir"])
    daemon.stop()
    artifact = artifact_path(cache, digest(rootfs))
    artifact.chmod(0o444)
    artifact.with_name(f"{artifact.name}.json").chmod(0o644)
    artifact.parent.chmod(0o755)
    source.unlink()
    daemon.start()
    for path in (artifact, artifact.with_name(f"{artifact.name}.json")):
        assert path.stat().st_mode & 0o007 == 0, path
    assert artifact.parent.stat().st_mode & 0o004 == 0
    async with daemon.client() as client:
        await boot(client, "one", plugin="site")
        assert "www" in (await run(client, "one", "ls", "/")).split()
        assert artifact.stat().st_mode & 0o007 == 0
