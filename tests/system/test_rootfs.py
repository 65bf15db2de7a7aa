"""A VM with a root filesystem: commands run in it, it survives stops and crashes, and belongs to this VM alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.system.kit import Daemon, boot, kill_hypervisor, run, until
from tests.system.rootfs import digest, is_clean, layer_of, make_ext4, plugin
from volant.client import Client
from volant.images import artifact_path
from volant.model import HealthCheck, Reason, VmView, Workload

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
