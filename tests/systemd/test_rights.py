"""The few rights of the service are enough for networks, images, directories and files of the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.oci.kit import tar, write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import boot, run
from tests.system.rootfs import busybox_layer, digest, make_ext4, plugin
from tests.systemd.kit import Box
from volant.directories import find_program
from volant.model import Artifact

OWNER = "1234"
SETUP = f"""
mkdir -p /srv/data /srv/results /var/images /etc/systemd/system/volantd.service.d /etc/default
echo data >/srv/data/file
chown {OWNER} /srv/results
printf '[Service]\\nReadWritePaths=/srv/results\\n' >/etc/systemd/system/volantd.service.d/directories.conf
cat >/etc/default/volantd <<.
VOLANT_HOST_DIRS=/srv/data,/srv/results:rw
VOLANT_ARTIFACT_DIRS=/var/images
.
"""


@needs_registry
@pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd")
async def test_a_vm_has_an_image_a_network_and_directories(box: Box, image_cache: Path) -> None:
    box.run("sh", "-ec", SETUP)
    layout, archive = box.root / "var/one", box.root / "var/images/one.tar"
    write_layout(layout, [busybox_layer(image_cache), tar(("one", {"data": b"one"}))])
    await trio.run_process(["skopeo", "copy", "--quiet", f"oci:{layout}:t", f"oci-archive:{archive}:t"])
    archive.chmod(0o600)
    box.volar("setup")
    async with box.client() as client:
        vm = await boot(
            client, "demo", image="oci-archive:/var/images/one.tar:t", start_workload=False, network="bridge",
            volumes=("/srv/data:/data", "/srv/results:/results:rw"),
        )  # fmt: skip
        gateway = f"{vm.ip_address.rpartition('.')[0]}.1"
        assert "0% packet loss" in await run(client, "demo", "busybox", "ping", "-c", "1", gateway)
        assert await run(client, "demo", "cat", "/one", "/data/file") == "onedata\n"
        await run(client, "demo", "sh", "-c", "echo done >/results/log; ! chmod u+s /results/log")
        assert box.run("stat", "-c", "%u %s", "/srv/results/log").stdout.split() == [OWNER, "5"]
        there = interfaces(box)
        await client.vms.delete("demo")
        assert len(there - interfaces(box)) == 1
    assert box.scopes() == []
    assert not [text for text in box.said() if "network" in text and "can't" in text]
    # Nobody writes to a layer; a group that may read it shows in the mode.
    modes = box.run("sh", "-c", "stat -c '%u %a' /var/cache/volant/oci/layers/*").stdout.split("\n")[:-1]
    assert len(modes) == 2
    assert set(modes) <= {"0 400", "0 440"}
    assert box.run("ls", "/var/cache/volant/oci/work").stdout == ""


@pytest.mark.full
async def test_a_plugin_names_an_image_of_the_host(box: Box, image_cache: Path) -> None:
    box.run("sh", "-ec", SETUP)
    image = make_ext4(box.root / "var/images/image.ext4", image_cache, files={"etc/word": "kept"})
    box.volar("setup")
    async with box.client() as client:
        await client.plugins.install(plugin("disk", Artifact("/var/images/image.ext4", digest(image))))
        await boot(client, "disk", plugin="disk")
        assert await run(client, "disk", "cat", "/etc/word") == "kept"


def interfaces(box: Box) -> set[str]:
    lines = box.run("cat", "/proc/net/dev").stdout.splitlines()
    return {line.partition(":")[0].strip() for line in lines if ":" in line}
