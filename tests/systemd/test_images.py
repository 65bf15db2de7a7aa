"""As a service the daemon has few capabilities, and fetches images by programs that are another user's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from tests.oci.kit import tar, write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import boot, run
from tests.system.rootfs import busybox_layer
from tests.systemd.kit import Box


@pytest.mark.full
@needs_registry
async def test_images_come_into_the_cache_and_boot(box: Box, image_cache: Path) -> None:
    base = busybox_layer(image_cache)
    for name in ("one", "two"):
        write_layout(box.root / "var" / name, [base, tar((name, {"data": name.encode()}))])
    archive = box.root / "var" / "two.tar"
    await trio.run_process(["skopeo", "copy", "--quiet", f"oci:{box.root}/var/two:t", f"oci-archive:{archive}:t"])
    archive.chmod(0o600)
    shutil.rmtree(box.root / "var" / "two")
    box.volar("setup")
    async with box.client() as client:
        await client.images.pull({"reference": "oci:/var/one:t"})
        # Its base is in the cache already.
        await boot(client, "demo", image="oci-archive:/var/two.tar:t", start_workload=False)
        assert await run(client, "demo", "cat", "/two") == "two"
        await client.vms.delete("demo")
        assert len(await client.images.list()) == 2
    # Nobody writes to a layer; a group that may read it shows in the mode.
    modes = box.run("sh", "-c", "stat -c '%u %a' /var/cache/volant/oci/layers/*").stdout.split("\n")[:-1]
    assert len(modes) == 3
    assert set(modes) <= {"0 400", "0 440"}
    assert box.run("ls", "/var/cache/volant/oci/work").stdout == ""
