"""The few rights of the service are enough for networks, images and directories of the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oci.kit import tar, write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import boot, run
from tests.system.rootfs import busybox_layer
from tests.systemd.kit import Box
from tests.systemd.test_host_directories import OWNER, SETUP
from volant.directories import find_program


@needs_registry
@pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd")
async def test_a_vm_has_an_image_a_network_and_directories(box: Box, image_cache: Path) -> None:
    write_layout(box.root / "var" / "one", [busybox_layer(image_cache), tar(("one", {"data": b"one"}))])
    box.run("sh", "-ec", SETUP)
    box.volar("setup")
    async with box.client() as client:
        vm = await boot(
            client, "demo", image="oci:/var/one:t", start_workload=False, network="bridge",
            volumes=("/srv/data:/data", "/srv/results:/results:rw"),
        )  # fmt: skip
        gateway = f"{vm.ip_address.rpartition('.')[0]}.1"
        assert "0% packet loss" in await run(client, "demo", "busybox", "ping", "-c", "1", gateway)
        assert await run(client, "demo", "cat", "/one", "/data/file") == "onedata\n"
        await run(client, "demo", "sh", "-c", "echo done >/results/log")
        assert box.run("stat", "-c", "%u %s", "/srv/results/log").stdout.split() == [OWNER, "5"]
        await client.vms.delete("demo")
    assert box.scopes() == []
    assert not [text for text in box.said() if "network" in text and "can't" in text]
