"""An upgrade with everything in use: VMs of each origin, networks of each kind, a snapshot, a disk, a warm process.

The previous version alone creates the state directory, the runtime directory, the cache and the memory files, with its
owners and modes. `VOLANT_TEST_PREVIOUS` names the commit; the default is the one before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from tests.system.kit import BOOT_S, REPOSITORY, Daemon, boot, reachable, run, until
from tests.system.lab import HOST, WORLD, Lab
from tests.system.rootfs import make_ext4, plugin
from tests.system.test_networked_vms import (
    FETCH,
    PORT,
    NetworkLab,
    fetch,
    is_on_the_network,
    serve,
    tells_from_where,
)
from tests.system.test_snapshots import fork
from tests.system.test_standby import filled
from tests.system.test_templates import template
from tests.system.test_upgrade import begin_with, previous
from volant.client import Client
from volant.model import RestoreVm, TakeSnapshot, VmView

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes bridges"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="nftables is not installed"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
    pytest.mark.skipif(shutil.which("mke2fs") is None, reason="e2fsprogs is not installed"),
]
__all__ = ["previous"]

_BUILD_S = 600.0


def build_image(tree: Path, cache: Path) -> None:
    """Builds the boot image of the code in `tree`, because the daemon's host cannot reach the package archive."""
    subprocess.run(
        [sys.executable, "-m", "volant.images", "build", "--cache", str(cache)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        timeout=_BUILD_S,
    )


@pytest.fixture
def cache() -> Iterator[Path]:
    """An empty cache in a place that the users of hypervisors can reach."""
    with TemporaryDirectory(prefix="vtc", dir="/tmp") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory) / "cache"


@pytest.fixture
def upgraded(cache: Path, previous: Path, _running: list[Daemon]) -> Iterator[tuple[Daemon, Lab]]:
    """A daemon of the previous version, not yet started, in its own host."""
    build_image(previous, cache)
    flags = ("--network", "auto", "--templates", "auto", "--standby", "1")
    with closing(NetworkLab()) as lab:
        daemon = Daemon(cache, *flags, wrapper=lab.host.enter, ephemeral=False)
        daemon.command += ["--listen", f"unix:{daemon.root}/api"]
        begin_with(daemon, previous)
        _running.append(daemon)
        try:
            yield daemon, lab
        finally:
            _running.remove(daemon)
            daemon.dispose()


@pytest.mark.full
async def test_running_vms_continue_and_stored_data_is_usable(
    upgraded: tuple[Daemon, Lab], tmp_path: Path, cache: Path
) -> None:
    daemon, lab = upgraded
    rootfs = make_ext4(tmp_path / "root.ext4", cache, files={"etc/who": "the root file system\n"})
    daemon.start()
    async with daemon.client() as client:
        before = await _prepare(daemon, lab, client, rootfs)
    processes = daemon.hypervisors()
    links = lab.host.links()
    daemon.kill()
    # The artifact of an installed plugin comes from the cache.
    rootfs.unlink()

    build_image(REPOSITORY, cache)
    begin_with(daemon, None)
    async with daemon.started() as client:
        assert daemon.hypervisors() == processes
        assert lab.host.links() == links
        for vm in before:
            after = await client.vms.get(vm.name)
            assert (after.id, after.pid, after.status, after.boots) == (vm.id, vm.pid, vm.status, vm.boots), vm.name
            assert (after.ip_address, after.mac_address) == (vm.ip_address, vm.mac_address), vm.name
        await client.vms.apply_and_wait("paused", "resume", ["running"])
        for vm in before:
            if vm.status != "stopped":
                await reachable(client, vm.name)
        await _check(lab, client)
        # A hypervisor of the previous version connects by itself, and finds the restarted passt.
        (passt,) = [pid for pid, tag in daemon.processes().items() if tag.startswith(f"{daemon.tag_prefix}n.")]
        os.kill(passt, signal.SIGKILL)
        again = f"until python3 -c '{FETCH}' {WORLD} {PORT} 2>/dev/null; do sleep 0.2; done"
        with trio.fail_after(60):
            assert await run(client, "user", "sh", "-c", again) == HOST
        assert (await client.vms.apply_and_wait("stopped", "start", ["running"], timeout_s=BOOT_S)).outcome == "met"
        assert await run(client, "stopped", "cat", "/kept") == "mine\n"
        await boot(client, "another", plugin="disk")
        assert await run(client, "another", "cat", "/etc/who") == "the root file system\n"
        await client.vms.create(RestoreVm(name="restored", from_snapshot="kept"))
        await until(client, "restored", "running")
        assert await run(client, "restored", "cat", "/tmp/note") == "noted\n"
        await fork(client, "cold")
        await boot(client, "new")
        await client.snapshots.delete("kept")


async def _prepare(daemon: Daemon, lab: Lab, client: Client, rootfs: Path) -> Sequence[VmView]:
    """Creates one VM of each kind; returns them."""
    await boot(client, "cold", boot="cold")
    await boot(client, "first")
    await template(daemon)
    await boot(client, "clone")
    await filled(daemon, exactly=False)
    await boot(client, "warm")
    await fork(client, "clone")
    await boot(client, "paused")
    await client.vms.apply_and_wait("paused", "pause", ["paused"])
    await client.plugins.install(plugin("disk", rootfs))
    await boot(client, "stopped", plugin="disk")
    await client.vms.write_file("stopped", "/kept", b"mine\n")
    await client.vms.apply_and_wait("stopped", "stop", ["stopped"])
    await boot(client, "web", ports=["0.0.0.0:8080:80"])
    await serve(client, "web")
    assert await fetch(lab, 8080) == "web\n"
    await boot(client, "user", network="user")
    assert await tells_from_where(client, "user") == HOST
    await client.vms.write_file("clone", "/tmp/note", b"noted\n")
    await client.snapshots.take("clone", TakeSnapshot(name="kept"))
    await filled(daemon, exactly=False)
    with trio.fail_after(BOOT_S):
        while any(vm.status in ("pending", "starting") for vm in await client.vms.list()):  # noqa: ASYNC110
            await trio.sleep(0.1)
    return await client.vms.list()


async def _check(lab: Lab, client: Client) -> None:
    """Checks that adopted VMs have the same networks as before."""
    for name in ("cold", "clone", "warm", "paused", "web"):
        await is_on_the_network(client, await client.vms.get(name))
    assert await fetch(lab, 8080) == "web\n"
    for name in ("web", "user"):
        assert await tells_from_where(client, name) == HOST
