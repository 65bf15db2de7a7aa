"""A VM of an OCI image runs what the image says, on a disk of its own above layers that all its VMs share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.oci.kit import tar, write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import BOOT_S, Daemon, boot, run, spec, until
from tests.system.rootfs import busybox_layer
from volant.client import ClientProblem, LogLine
from volant.model import CreateVolume

pytestmark = needs_registry

PROGRAM = "echo \"$MODE as $(id -un) in $(pwd)\"; trap 'echo asked to end; exit 7' INT; while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def layout(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of two layers, as an OCI layout."""
    base = busybox_layer(
        image_cache, ("etc", {}),
        ("etc/passwd", {"data": b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/app:/bin/sh\n"}),
        ("etc/group", {"data": b"root:x:0:\nwww:x:1002:app\n"}), ("etc/first", {"data": b"1"}),
        ("tmp", {"mode": 0o1777}), ("large", {}), ("large/file", {"data": bytes(24 * 2**20)}),
    )  # fmt: skip
    upper = tar(("etc", {}), ("etc/.wh.first", {"data": b""}), ("etc/second", {"data": b"2"}), ("app", {"mode": 0o700}))
    image = write_layout(
        tmp_path_factory.mktemp("oci") / "layout", [base, upper],
        Entrypoint=["/bin/sh", "-c"], Cmd=[PROGRAM], Env=["MODE=image", "PATH=/bin"], User="app", WorkingDir="/work",
        StopSignal="SIGINT", Labels={"version": "1"}, ExposedPorts={"80/tcp": {}},
        Volumes={"/absent/data": {}},
    )  # fmt: skip
    return f"oci:{image.layout}:t"


async def test_a_vm_runs_the_program_of_its_image_as_its_user(daemon: Daemon, layout: str) -> None:
    async with daemon.client() as client:
        await client.volumes.create(CreateVolume(name="data", size_mb=16))
        vm = await boot(client, "demo", image=layout, volumes=("data:/etc",))
        assert vm.image is not None
        assert (vm.image.reference, vm.image.command) == (layout, ("/bin/sh", "-c", PROGRAM))
        assert (vm.disk, vm.disk_mb, vm.labels) == ("overlay", 10240, {"version": "1"})
        async with client.vms.logs("demo", since=0, streams=["stdout"]) as log:
            line = await log.receive()
        assert isinstance(line, LogLine)
        assert line.line == "image as app in /work"
        assert await run(client, "demo", "sh", "-c", "cat /etc/second; ls /etc; id -un; echo $MODE") == (
            "2group\nhosts\npasswd\nsecond\napp\nimage\n"
        )
        assert " /etc ext4 rw" in await run(client, "demo", "cat", "/proc/mounts")
        await client.vms.delete("demo")
        # The image's files are in the empty volume now.
        await boot(client, "reader", volumes=("data:/data:ro",))
        assert "app:x:1000:1001" in await run(client, "reader", "cat", "/data/passwd")
        await client.vms.delete("reader")
        await client.volumes.delete("data")


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: .ci/system-packages network")
async def test_exposed_ports_are_published_and_the_image_says_how_its_program_is_asked_to_end(
    daemon: Daemon, layout: str
) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "demo", image=layout, network="user", publish_all=True, user="root", disk_mb=64)
        [port] = vm.ports
        address, guest = port.rsplit(":", 1)
        assert guest == "80/tcp"
        await run(client, "demo", "sh", "-c", "cd /etc; busybox httpd -p 80")
        async with httpx.AsyncClient(trust_env=False, timeout=BOOT_S) as http:
            assert (await http.get(f"http://{address}/second")).text == "2"
        # A full disk is an error of who writes.
        filled = await run(client, "demo", "sh", "-c", "cat /dev/zero 2>&1 >/app/fill; rm /app/fill; df /app | tail -1")
        assert "No space left on device" in filled
        await run(client, "demo", "sh", "-c", "echo more > /app/file")
        await client.vms.stop("demo", grace_s=BOOT_S)
        await until(client, "demo", "stopped")
        async with client.vms.logs("demo", since=0, streams=["stdout"], follow=False) as log:
            lines = [line.line async for line in log if isinstance(line, LogLine)]
        assert lines == ["image as root in /work", "asked to end"]


async def test_a_template_of_an_image_is_cloned(make_daemon: Callable[..., Daemon], layout: str) -> None:
    daemon = make_daemon("--templates", "auto")
    async with daemon.client() as client:
        built = await client.vms.create_and_wait(
            spec("first", image=layout, memory_mb=256, boot="template"), timeout_s=BOOT_S
        )
        assert built.outcome == "met", built
        assert built.vm is not None
        assert built.vm.booted_from == "template"
        shown = [template.plugin for template in await client.templates.list()]
        assert layout in shown
        clone = await boot(client, "second", image=layout, memory_mb=256, start_workload=False, user="root")
        assert (clone.booted_from, clone.workload) == ("template", None)
        assert (
            await run(client, "second", "cat", "/etc/second", "/etc/hosts") == "2127.0.0.1 localhost\n::1 localhost\n"
        )
        await run(client, "second", "sh", "-c", "echo mine > /etc/mine")
        await run(client, "second", "sh", "-c", "echo mine > /absent/data/file")
        # What one has written, the other does not see.
        assert "mine" not in await run(client, "first", "ls", "/etc")


async def test_a_vm_of_an_image_is_forked_with_its_disk(daemon: Daemon, layout: str) -> None:
    async with daemon.client() as client:
        await boot(client, "demo", image=layout, start_workload=False, user="root")
        await run(client, "demo", "sh", "-c", "echo kept > /app/file")
        (copy,) = await client.vms.fork("demo", {"names": ["copy"]})
        await until(client, "copy", "running")
        assert copy.image is not None
        assert await run(client, "copy", "cat", "/app/file") == "kept\n"


async def test_an_image_that_can_not_be_had_makes_no_vm(daemon: Daemon, layout: str) -> None:
    async with daemon.client() as client:
        for image, status, code in (
            (layout.replace(":t", ":other"), 404, "image-not-found"),
            ("oci:/nowhere", 404, "image-not-found"),
            ("no such:image", 400, "invalid-image-reference"),
            ("127.0.0.1:1/none", 503, "registry-unreachable"),
        ):
            with pytest.raises(ClientProblem) as refused:
                await client.vms.create(spec("demo", image=image))
            assert (refused.value.status, refused.value.code, refused.value.field) == (status, code, "image")
        assert await client.vms.list() == []
