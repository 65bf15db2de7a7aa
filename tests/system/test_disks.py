"""A VM's disk has the requested size, and filling it affects no other VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.kit import Daemon, boot, run, spec, until
from tests.system.rootfs import layer_of, make_ext4, plugin
from volant.client import ClientProblem

IMAGE_MB, DISK_MB = 24, 96
FILL = ("dd", "if=/dev/zero", "of=/fill", "bs=1M", "count=400")


@pytest.fixture(scope="module")
def rootfs(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ext4(tmp_path_factory.mktemp("rootfs") / "small.ext4", image_cache, size_mb=IMAGE_MB)


@pytest.mark.full
async def test_a_guest_can_fill_its_disk_without_affecting_others(daemon: Daemon, rootfs: Path) -> None:
    async with daemon.client() as client, daemon.http() as http:
        await client.plugins.install(plugin("small", rootfs))
        vm = await boot(client, "one", plugin="small", disk_mb=DISK_MB)
        assert (vm.disk, vm.disk_mb) == ("overlay", DISK_MB)
        info = await client.vms.agent_info("one")
        assert IMAGE_MB < DISK_MB * 3 // 4 < info["disk"]["total_mb"] <= DISK_MB
        other = await boot(client, "two", plugin="small")
        assert other.disk_mb is None
        assert (await client.vms.agent_info("two"))["disk"]["total_mb"] <= IMAGE_MB

        async with client.vms.exec("one", FILL, timeout_s=120) as process:
            said = b"".join([piece.data async for piece in process])
        assert process.end is not None
        assert process.end.exit_code != 0
        assert b"No space left" in said
        await run(client, "one", "sync")
        [layer] = [layer_of(path) for path in daemon.disks() if Path(path).name.startswith(f"{vm.id}-")]
        assert layer.stat().st_size <= (DISK_MB + 2) * 2**20
        # The other VMs and the daemon have as much space as before.
        await run(client, "two", "dd", "if=/dev/zero", "of=/mine", "bs=1M", "count=4")
        await run(client, "two", "sync")
        assert (await http.get("/healthz")).json() == {"status": "ok"}

        # Size and data survive a stop.
        await run(client, "one", "rm", "/fill")
        await run(client, "one", "mkdir", "/kept")
        await client.vms.stop("one")
        await until(client, "one", "stopped")
        await client.vms.start("one")
        await until(client, "one", "running")
        assert "kept" in await run(client, "one", "ls", "/")
        assert (await client.vms.agent_info("one"))["disk"]["total_mb"] == info["disk"]["total_mb"]

        # An impossible size is refused before anything is created, or at the boot if it is only known then.
        await client.vms.create(spec("tiny", plugin="small", disk_mb=IMAGE_MB - 1))
        vm_or_none = await until(client, "tiny", "crashed")
        assert vm_or_none is not None
        assert vm_or_none.reason is not None
        assert vm_or_none.reason.code == "disk_too_small"
        with pytest.raises(ClientProblem) as refused:
            await client.vms.create(spec("bare", disk_mb=DISK_MB))
        assert (refused.value.status, "no root filesystem" in str(refused.value)) == (422, True)
        with pytest.raises(ClientProblem) as refused:
            await client.vms.create(spec("huge", plugin="small", disk_mb=16 * 1024 * 1024))
        assert (refused.value.status, "MiB are left" in str(refused.value)) == (503, True)
