"""As a service the daemon sandboxes hypervisors completely, limits each VM, and lacks no feature."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.system.kit import boot, run, until
from tests.systemd.kit import Box
from volant.daemon._settings import parse_uids
from volant.model import ForkVm
from volant.vm._capacity import CEILING_MB


async def test_hypervisors_are_sandboxed_and_limited_and_can_be_copied(box: Box) -> None:
    box.volar("setup")
    async with box.client() as client:
        info = (await client.system.info())["sandbox"]
        assert (info["users"], info["no_users"]) == ("65536-98303", None)
        one = await boot(client, "one")
        # A copy of a copy is read out of its process, which is another user's.
        [two] = await client.vms.fork("one", ForkVm(count=1))
        await until(client, two.name, "running")
        [three] = await client.vms.fork(two.name, ForkVm(count=1))
        await until(client, three.name, "running")
        users = set()
        for name in (one.name, two.name, three.name):
            vm = await client.vms.get(name)
            lines = box.run("cat", f"/proc/{vm.pid}/status").stdout.splitlines()
            status = {key: text.split() for key, _, text in (line.partition(":") for line in lines)}
            users.add(int(status["Uid"][1]))
            assert {int(status[key][0], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert status["NoNewPrivs"] == ["1"]
            assert box.run("cat", f"/proc/{vm.pid}/oom_score_adj").stdout.strip() == "0"
            assert (await client.vms.memory(name)).host.pss_mb > 0
            assert await run(client, name, "echo", "well") == "well\n"
        assert len(users) == 3
        # systemd skips it where it lacks CAP_SYS_RESOURCE itself.
        assert box.show("volantd.service", "OOMScoreAdjust") == "-500"
        assert users < set(parse_uids(info["users"]))
        scopes = box.scopes()
        assert len(scopes) == 3
        for scope in scopes:
            assert box.show(scope, "MemoryMax") == str((128 + CEILING_MB) * 2**20)
            assert box.show(scope, "CPUQuotaPerSecUSec") == "2s"
            assert box.show(scope, "TasksMax") == "257"
        for name in (three.name, two.name, "one"):
            await client.vms.delete(name)
    assert box.scopes() == []
    # What the kernel refuses a daemon without the rights that it needs would be told here.
    assert not [
        text
        for text in box.said()
        if "no users of their own" in text or "stays in the daemon's" in text or "for memory" in text
    ]


async def test_the_daemon_builds_its_boot_image(box: Box, image_cache: Path) -> None:
    """It has no network here, so of the packages of the last build."""
    cache = box.root / "var/cache/volant"
    shutil.rmtree(cache / "images")
    (cache / "current.json").unlink()
    shutil.copytree(image_cache / "packages", cache / "packages")
    box.volar("setup")
    async with box.client() as client:
        await boot(client, "one")
        assert await run(client, "one", "echo", "well") == "well\n"
        await client.vms.delete("one")
    (built,) = (cache / "images").iterdir()
    assert (image_cache / "images" / built.name).is_dir()
    assert not list(cache.glob("build-*"))
