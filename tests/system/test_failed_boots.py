"""A failed boot ends in `crashed` within its deadline, with its cause and the last lines of the console."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.kit import BOOT_S, Daemon, adopted, boot, run, spec, until
from volant import images
from volant.client import Client, ClientError, ClientProblem
from volant.model import Reason

"""A shell as init: the guest runs, but no agent answers."""


async def crash_reason(client: Client, name: str, *, timeout_s: float = BOOT_S) -> Reason:
    """Waits for the crash; returns its reason."""
    vm = await until(client, name, "crashed", timeout_s=timeout_s)
    assert vm is not None
    assert vm.reason is not None
    print(vm.reason.code, "|", vm.reason.message, "|", *vm.reason.console[-5:], sep="\n  ")
    return vm.reason


def mounted(script: str) -> list[str]:
    """Returns a wrapper that runs a command with other mounts; skips the test if that is impossible."""
    for flags in ("-m", "-rm"):
        wrapper = ["unshare", flags, "sh", "-ec", f'{script}; exec "$@"', "sh"]
        if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0:
            return wrapper
    pytest.skip("this host allows no mount namespaces")


@pytest.mark.parametrize(
    ("init", "said"),
    [
        pytest.param("/nonexistent", "Kernel panic", id="a kernel that panics"),
        pytest.param("/usr/bin/busybox", "Attempted to kill init", id="an init that dies at once"),
    ],
)
async def test_a_boot_that_panics(daemon: Daemon, init: str, said: str) -> None:
    async with daemon.client() as client:
        await client.vms.create(spec("demo", kernel_cmdline=f"rdinit={init}"))
        reason = await crash_reason(client, "demo")
        assert reason.code == "guest_panicked"
        assert any(said in line for line in reason.console)


async def test_a_kernel_that_panics_while_it_runs(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
        with pytest.raises((ClientError, ClientProblem)):
            await run(client, "demo", "sh", "-c", "echo c >/proc/sysrq-trigger")
        reason = await crash_reason(client, "demo", timeout_s=30)
        assert reason.code == "guest_panicked"
        assert any("Kernel panic" in line for line in reason.console)
        log = []
        async with client.vms.logs("demo", tail=1000, follow=False) as lines:
            log = [line.line async for line in lines]  # type: ignore[union-attr]  # a gap would fail here
        assert any("sysrq" in line for line in log)


async def test_an_initramfs_that_is_missing(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(environ={"VOLANT_INITRAMFS": "/nonexistent/initramfs"})
    async with daemon.client() as client:
        await client.vms.create(spec("demo"))
        reason = await crash_reason(client, "demo", timeout_s=30)
        assert reason.code == "image_missing"
        assert "/nonexistent/initramfs" in reason.message
        assert "VOLANT_INITRAMFS" in reason.message
        await adopted(client)


async def test_without_qemu_the_daemon_stays_healthy_and_only_the_vm_crashes(
    make_daemon: Callable[..., Daemon],
) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    daemon = make_daemon(wrapper=mounted(f"mount --bind /dev/null {qemu}"))
    async with daemon.client() as client:
        await adopted(client)
        await client.vms.create(spec("demo"))
        reason = await crash_reason(client, "demo", timeout_s=30)
        assert reason.code == "qemu_missing"
        assert "apt install" in reason.message
        assert (await client.healthz()).status == "ok"
        info = await client.system.info()
        assert info["hypervisor_version"] is None


async def test_less_memory_than_the_image_needs_is_400_with_the_number(daemon: Daemon, image_cache: Path) -> None:
    image = images.find(image_cache)
    assert image is not None
    async with daemon.http() as http:
        answer = await http.post(
            "/api/v1/vms", json={"name": "demo", "cpu_cores": 1, "memory_mb": image.min_memory_mb - 1}
        )
        assert (answer.status_code, answer.json()["field"]) == (400, "memory_mb")
        assert str(image.min_memory_mb) in answer.json()["detail"]
