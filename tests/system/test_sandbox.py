"""Each hypervisor of a real daemon runs in the sandbox that the daemon reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.kit import Daemon, boot, run
from volant.daemon._settings import parse_uids
from volant.hypervisor.qemu import user_of

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
