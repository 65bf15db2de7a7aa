"""Each hypervisor of a real daemon runs in the sandbox that the daemon reports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.intruder import DENIED, PYTHON, tries
from tests.system.kit import Daemon, boot, run
from volant.daemon._settings import parse_uids
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import SandboxPlan, user_of
from volant.hypervisor.qemu._sandbox import QemuSandbox
from volant.model import VmView

# A clone has no memory file of its own, and reads its template's through an additional group.
pytestmark = pytest.mark.cold

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="users of their own are given by root")


async def sandbox_of(daemon: Daemon, name: str) -> dict[str, Any]:
    async with daemon.http() as http:
        inspected = (await http.get(f"/api/v1/vms/{name}/inspect")).raise_for_status().json()
        found: dict[str, Any] = inspected["actor"]["actor"]["process"]["sandbox"]
        return found


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: text.split() for name, _, text in (line.partition(":") for line in lines)}


def core_limit(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/limits").read_text().split("core file size")[1].split()[:2]


def opened_by(pid: int) -> set[str]:
    """Returns the files that a process has open or mapped."""
    found = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        found.add(line.split(maxsplit=5)[5] if len(line.split()) > 5 else "")
    return {path.removesuffix(" (deleted)") for path in found if path.startswith("/")}


@as_root
async def test_two_hypervisors_have_a_user_each_no_capability_and_no_file_of_the_other(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        info = (await http.get("/api/v1/system/info")).json()["sandbox"]
        vms = [await boot(client, name) for name in ("one", "two")]
        users = parse_uids("65536-98303")
        assert info["users"] == "65536-98303"
        for vm in vms:
            assert vm.pid is not None
            status, sandbox = status_of(vm.pid), await sandbox_of(daemon, vm.name)
            user = user_of(users, f"{daemon.tag_prefix}{vm.id}.1", vm.id)
            assert status["Uid"] == status["Gid"] == [str(user)] * 4
            assert status["Groups"] == []
            assert {int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
            # QEMU's seccomp filter, and ours if there is one.
            assert int(status["Seccomp_filters"][0]) == 1 + info["no_connect"]
            assert core_limit(vm.pid) == ["0", "0"]
            assert (sandbox["user"], sandbox["capabilities"], sandbox["landlock"]) == (user, 0, info["landlock"])
            other = "two" if vm.name == "one" else "one"
            its = {str(each.id): each.name for each in vms}
            for path in opened_by(vm.pid):
                if path.startswith((str(daemon.root), str(daemon.memory_dir))):
                    name = path.removeprefix(str(daemon.runtime_dir / "vms")).split("/")[1]
                    assert its.get(name.removesuffix(".mem"), vm.name) != other, path
                    assert "volant.db" not in path
        assert len({status_of(vm.pid or 0)["Uid"][0] for vm in vms}) == 2
        # They work like other VMs.
        assert await run(client, "one", "echo", "hello") == "hello\n"


def spec_of(daemon: Daemon, vm: VmView, **other: Any) -> MachineSpec:
    """Returns the spec of a machine like that VM's, as far as the sandbox depends on it."""
    found = MachineSpec(
        vm_id=vm.id,
        name=vm.name,
        cpu_cores=1,
        memory_mb=vm.memory_mb,
        kernel=Path("/usr/bin/true"),
        initramfs=Path("/usr/bin/true"),
        cmdline="",
        directory=daemon.runtime_dir / "vms" / str(vm.id),
        memory_file=daemon.memory_dir / f"{vm.id}.mem",
        tag=f"volant-test-{vm.id}",
        accelerator="tcg",
    )
    return msgspec.structs.replace(found, **other)


@as_root
async def test_an_intruder_in_the_place_of_a_hypervisor_reaches_neither_the_daemon_nor_another_vm(
    daemon: Daemon, tmp_path: Path
) -> None:
    if PYTHON is None:
        pytest.skip("there is no Python where programs lie")
    host = Host()
    async with daemon.client() as client, daemon.http() as http:
        info = (await http.get("/api/v1/system/info")).json()["sandbox"]
        victim = await boot(client, "victim")
        spec = spec_of(daemon, victim)
        plan = SandboxPlan(
            places=(daemon.state_dir, daemon.runtime_dir, daemon.memory_dir),
            landlock=info["landlock"],
            no_connect=info["no_connect"],
            users=parse_uids(info["users"]),
        )
        own = daemon.root / "intruder"
        own.mkdir(mode=0o700)
        memory = tmp_path / "memory"
        mine = msgspec.structs.replace(
            spec, vm_id=victim.id + 1, directory=own, memory_file=memory, tag="volant-test-0"
        )
        for path in (memory, mine.console_path, mine.console_input_path):
            path.touch(mode=0o600)
        sandbox = await QemuSandbox(host, plan).prepare(mine)
        its, pid, port = spec.directory, victim.pid, int(daemon.base_url.rpartition(":")[2])
        assert pid is not None
        tasks: list[tuple[object, ...]] = [
            *((what, str(path)) for what in ("read", "append", "chmod", "remove")
              for path in (spec.memory_file, its / "console.log", its / "qemu.log", daemon.state_dir / "volant.db")),
            *(("list", str(path)) for path in (daemon.state_dir, daemon.runtime_dir, daemon.memory_dir, its, "/proc")),
            *(("unix", str(path)) for path in its.glob("*.sock")),
            ("tcp", port),
            *((what, who) for what in ("kill", "ptrace") for who in (pid, daemon.pid, 1)),
            *(("read", f"/proc/{who}/{name}") for who in (pid, daemon.pid) for name in ("mem", "environ", "cmdline")),
            ("list", f"/proc/{pid}/root"), ("setuid",), ("chroot",), ("mount",), ("uring",),
        ]  # fmt: skip
        assert len([task for task in tasks if task[0] == "unix"]) >= 3
        found, status = await tries(host, mine.tag, own, sandbox, [("append", "console.log"), *tasks])
        assert found.pop(("append", "console.log")) == "DONE"
        assert {task: result for task, result in found.items() if result not in DENIED} == {}
        assert status.user not in (0, status_of(pid)["Uid"][0])
        assert (status.capabilities, status.no_new_privileges) == (0, True)
        # The other VM has noticed nothing.
        assert await run(client, "victim", "echo", "well") == "well\n"
        record = json.loads((its / "sandbox.json").read_text())
        assert record["landlock"] == info["landlock"]


async def test_a_vm_runs_without_a_sandbox(image_cache: Path) -> None:
    """An operator can turn the sandbox off."""
    daemon = Daemon(image_cache, "--sandbox", "off")
    try:
        daemon.start()
        async with daemon.client() as client, daemon.http() as http:
            vm = await boot(client, "bare")
            assert (await http.get("/api/v1/system/info")).json()["sandbox"] is None
            assert vm.pid is not None
            assert status_of(vm.pid)["Uid"][0] == str(os.geteuid())
            with trio.fail_after(60):
                assert await run(client, "bare", "true") == ""
    finally:
        daemon.dispose()
