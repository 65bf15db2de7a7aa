"""Under systemd: a restart touches no VM and fails no client, a daemon that hangs comes back, guests are asked."""

from __future__ import annotations

import trio

from tests.system.kit import BOOT_S, boot, run, spec
from tests.systemd.kit import Box
from volant.client import Client
from volant.model import VmView

NAMES = ("one", "two")
WATCHDOG = """[Service]
WatchdogSec=3s
Environment=VOLANT_ACCELERATOR=tcg
"""


async def uptime_s(client: Client, name: str) -> float:
    return float((await run(client, name, "cat", "/proc/uptime")).split()[0])


async def well(box: Box, timeout_s: float = 60.0) -> None:
    """Wait until the daemon has started and says that it is well."""
    with trio.fail_after(timeout_s):
        while box.show("volantd.service", "SubState") != "running":  # noqa: ASYNC110 - systemd's
            await trio.sleep(0.1)
        async with box.client() as client:
            while (await client.healthz()).status != "ok":  # noqa: ASYNC110 - and the daemon's
                await trio.sleep(0.1)


async def test_vms_outlive_restarts_and_hangs_of_the_daemon_and_are_asked_before_the_host_goes(box: Box) -> None:
    folder = f"/proc/{box.init}/root/etc/systemd/system/volantd.service.d"
    await trio.Path(folder).mkdir()
    await trio.Path(folder, "test.conf").write_text(WATCHDOG)
    box.volar("setup")
    assert box.show("volantd.service", "ActiveState") == "active"
    assert box.show("volantd.service", "StatusText") == "no VMs"

    # Each VM is in a scope of its own under one slice.
    async with box.client() as client, trio.open_nursery() as nursery:
        for name in NAMES:
            nursery.start_soon(boot, client, name)
    async with box.client() as client:
        before = {name: await client.vms.get(name) for name in NAMES}
        uptimes = {name: await uptime_s(client, name) for name in NAMES}
        scopes = box.scopes()
        assert len(scopes) == 2
        found = box.processes("qemu-system")
        qemus = {pid: group for pid, group in found.items() if group.startswith("/volant.slice/")}
        # What becomes a template, or waits to be a VM, is the daemon's own.
        assert {group.rpartition("/")[2] for pid, group in found.items() if pid not in qemus} <= {"volantd.service"}
        assert sorted(qemus) == sorted(vm.pid for vm in before.values() if vm.pid is not None)
        assert sorted(group.removeprefix("/volant.slice/") for group in qemus.values()) == scopes
        assert {box.show(scope, "Description") for scope in scopes} == {"VM one", "VM two"}

    # A restart: the VMs go on, and a client that asks meanwhile waits.
    daemon = box.show("volantd.service", "MainPID")
    answered: list[str] = []

    async def restart() -> None:
        await trio.to_thread.run_sync(box.systemctl, "restart", "volantd.service")

    async def create() -> None:
        while box.show("volantd.service", "ActiveState") == "active" and not restarted.is_set():  # noqa: ASYNC110
            await trio.sleep(0.02)
        with trio.fail_after(60):
            async with box.client() as other:
                vm = await other.vms.create(spec("late"))
                answered.append(vm.status)

    restarted = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        await restart()
        restarted.set()
    assert answered
    assert box.show("volantd.service", "MainPID") != daemon
    await well(box)
    await still_there(box, before, uptimes)

    # A daemon that hangs is replaced by its watchdog.
    daemon = box.show("volantd.service", "MainPID")
    box.run("kill", "-STOP", daemon)
    with trio.fail_after(60):
        while box.show("volantd.service", "MainPID") in (daemon, "0"):  # noqa: ASYNC110 - systemd's
            await trio.sleep(0.1)
    await well(box)
    assert "watchdog" in " ".join(box.said("_PID=1", "UNIT=volantd.service")).lower()
    # It says where it hung.
    assert any("Fatal Python error: Aborted" in text for text in box.said())
    await still_there(box, before, uptimes)

    # What the daemon says has fields.
    entries = box.journal("SYSLOG_IDENTIFIER=volantd", "VM=one", "EVENT=VM_RUNNING")
    assert [entry["PRIORITY"] for entry in entries] == ["6"]
    assert box.journal("SYSLOG_IDENTIFIER=volantd", "VM=one", "EVENT=VM_CRASHED") == []
    assert any("REQUEST_ID" in entry for entry in box.journal("LOGGER=volant.api.request"))

    async with box.client() as client:
        await client.vms.delete("late")

    # The host goes down: guests are asked, then their scopes end, then nothing is left.
    box.systemctl("poweroff", "--no-block")
    await trio.to_thread.run_sync(box.wait, 120.0)
    said = box.said("_PID=1", "+", "SYSLOG_IDENTIFIER=volant-guests")
    assert not any("and is killed" in text or "systemd will kill it" in text for text in said), said
    tags = [scope.removesuffix(".scope") for scope in scopes]
    asked = [said.index(f"{tag}: the guest shut down") for tag in tags]
    stopped = [position for position, text in enumerate(said) if text.startswith("Stopped volantd.service")]
    assert stopped
    assert max(stopped) < min(asked)


async def still_there(box: Box, before: dict[str, VmView], uptimes: dict[str, float]) -> None:
    async with box.client() as client:
        for name in NAMES:
            after = await client.vms.get(name)
            assert (after.pid, after.status, after.boots) == (before[name].pid, "running", 1)
            with trio.fail_after(BOOT_S):
                assert await uptime_s(client, name) > uptimes[name]
            assert any(name in box.show(scope, "Description") for scope in box.scopes())


async def test_removing_it_leaves_nothing(box: Box) -> None:
    box.volar("setup")
    async with box.client() as client:
        await boot(client, "demo")
    refused = box.volar("setup", "--uninstall", check=False)
    assert refused.returncode == 1
    assert "VMs run" in refused.stderr
    box.volar("setup", "--uninstall", "--stop-vms", "--purge")
    found = box.run("find", "/etc/systemd/system", "/run", "/dev/shm", "/var/lib", "-name", "*volant*").stdout
    assert [path for path in found.split() if not path.startswith("/run/systemd/propagate")] == []
    assert box.processes("volant") == {}
    assert box.systemctl("list-unit-files", "--no-legend", "volant*").stdout == ""
    assert box.systemctl("list-units", "--all", "--no-legend", "volant*").stdout == ""
