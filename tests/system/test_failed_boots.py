"""A failed boot ends in `crashed` within its deadline, with its cause and the last lines of the console."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, adopted, boot, run, spec, until
from volant.client import Client, ClientError, ClientProblem
from volant.model import Reason

HANGS = "rdinit=/bin/sh"
SOON_S = 40.0
"""Ten times what it takes, and less than a boot has."""
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


@pytest.mark.full
async def test_an_agent_that_never_answers(make_daemon: Callable[..., Daemon]) -> None:
    # Long enough for the guest to write to its console on a busy machine.
    daemon = make_daemon("--agent-timeout-s", "20")
    async with daemon.client() as client:
        await client.vms.create(spec("demo", kernel_cmdline=HANGS))
        reason = await crash_reason(client, "demo")
        assert reason.code == "agent_timeout"
        assert "20 s" in reason.message
        assert reason.console
        # The process ends a moment after the reason is reported.
        assert (await client.vms.apply_and_wait("demo", "stop", ["stopped"])).outcome == "met"
        assert daemon.hypervisors() == {}
        assert daemon.files() == []


async def test_a_vm_whose_boot_hangs_can_be_deleted(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        await client.vms.create(spec("demo", kernel_cmdline=HANGS))
        with trio.fail_after(BOOT_S):
            async with client.vms.logs("demo", streams=["console"], tail=0) as log:
                while "/bin/sh" not in (await log.receive()).line:  # type: ignore[union-attr]  # a gap would fail here
                    pass
        assert (await client.vms.get("demo")).status == "starting"
        # Long before its boot would be given up.
        with trio.fail_after(SOON_S):
            assert (await http.delete("/api/v1/vms/demo")).status_code == 204
        assert daemon.hypervisors() == {}
        assert daemon.files() == []


async def test_a_stop_works_while_a_boot_hangs(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "kernel_cmdline": HANGS}
        assert (await http.post("/api/v1/vms?wait=starting", json=body)).headers["volant-wait"] == "met"
        with trio.fail_after(SOON_S):
            assert (await client.vms.apply_and_wait("demo", "stop", ["stopped"])).outcome == "met"


async def test_an_initramfs_that_is_missing(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(environ={"VOLANT_INITRAMFS": "/nonexistent/initramfs"})
    async with daemon.client() as client:
        await client.vms.create(spec("demo"))
        reason = await crash_reason(client, "demo", timeout_s=30)
        assert reason.code == "image_missing"
        assert "/nonexistent/initramfs" in reason.message
        assert "VOLANT_INITRAMFS" in reason.message
        await adopted(client)


async def test_a_kernel_that_is_not_a_kernel(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel at all\n" * 1000)
    daemon = make_daemon("--kernel", str(kernel))
    async with daemon.client() as client:
        await client.vms.create(spec("demo"))
        reason = await crash_reason(client, "demo", timeout_s=60)
        assert reason.code == "bad_image"
        assert "kernel" in reason.message


async def test_memory_that_is_refused_at_launch_although_it_was_admitted(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(wrapper=mounted("mount -t tmpfs -o size=64m none /dev/shm"))
    async with daemon.client() as client:
        await client.vms.create(spec("demo", boot="cold"))
        reason = await crash_reason(client, "demo", timeout_s=30)
        assert reason.code == "memory_refused"
        assert "128 MiB" in reason.message
        assert (await client.healthz()).status == "ok"


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
