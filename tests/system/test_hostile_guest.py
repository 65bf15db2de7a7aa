"""A guest with a hostile root harms only its own VM, which can be deleted at any time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.system.hostile import (
    EVIL,
    IN_THE_GUEST,
    OTHER,
    Noticed,
    boot_evil,
    delete_evil,
    hostile_plugin,
    noticing,
    turn,
)
from tests.system.hostile_agent import PORTS, SERVERS
from tests.system.kit import Daemon, boot, load, spec
from tests.system.rootfs import layer_of, make_ext4
from volant.client import ClientError, ClientProblem

LONG_S = load("VOLANT_TEST_HOSTILE_S", usual=4, full=30)
"""Seconds for which each behaviour runs."""
RSS_MB = 60
LOGS_MB = 80
"""A VM's log is limited to 64 MiB, including the fields of each line."""


@pytest.fixture(scope="module", autouse=True)
def others(module_daemon: Daemon, image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the plugin, and boots another user's VM."""

    async def begin() -> None:
        async with module_daemon.client() as client:
            await client.plugins.install(hostile_plugin(tmp_path_factory.mktemp("hostile"), image_cache))
            await boot(client, OTHER)

    trio.run(begin)
    module_daemon.kept = {OTHER}
    yield
    module_daemon.kept = set()
    module_daemon.delete_vms()


def check(noticed: Noticed) -> None:
    print(noticed)
    assert noticed.asked > 3
    assert noticed.grown_mb < RSS_MB
    assert noticed.disk_mb < 2 * LOGS_MB


ALL = [*PORTS, *SERVERS, *IN_THE_GUEST, "events"]
SOME = ["garbage"]


@pytest.mark.parametrize(
    "behaviour", [*SOME, *(pytest.param(each, marks=pytest.mark.full) for each in ALL if each not in SOME)]
)
async def test_no_other_vm_is_affected(daemon: Daemon, behaviour: str) -> None:
    async with daemon.client() as client:
        await boot_evil(client)
        async with noticing(daemon, client) as noticed:
            await turn(client, behaviour)
            with trio.move_on_after(LONG_S):
                # Requests to the hostile guest get an answer or an error.
                while True:
                    with suppress(ClientError, ClientProblem):
                        await client.vms.agent_health(EVIL)
                    await trio.sleep(0.1)
            inspected = await client.vms.inspect(EVIL)
            assert len(repr(inspected)) < 20_000
            await delete_evil(client, noticed)
        check(noticed)


@pytest.mark.parametrize("behaviour", [pytest.param("garbage", marks=pytest.mark.full), "lies"])
async def test_a_guest_that_is_hostile_from_the_start_does_not_become_running(daemon: Daemon, behaviour: str) -> None:
    async with daemon.client() as client:
        async with noticing(daemon, client) as noticed:
            await client.vms.create(spec(EVIL, plugin="hostile", kernel_cmdline=f"hostile={behaviour}"))
            waited = await client.vms.wait(EVIL, ["running", "crashed"], timeout_s=30)
            if waited.outcome == "met":
                # Its message is stored in the row and in events, so it is truncated.
                assert waited.vm is not None
                assert waited.vm.status == "crashed"
                assert waited.vm.reason is not None
                print(waited.vm.reason.message)
                assert len(waited.vm.reason.message) < 3000
            await delete_evil(client, noticed)
        check(noticed)


@pytest.mark.full
async def test_a_guest_that_fills_its_disk_gets_its_size_and_no_more(
    daemon: Daemon, image_cache: Path, tmp_path: Path
) -> None:
    size_mb = 64
    rootfs = make_ext4(tmp_path / "rootfs.ext4", image_cache, size_mb=size_mb)
    manifest = hostile_plugin(tmp_path, image_cache, rootfs=rootfs)
    manifest = type(manifest)(name="with-disk", version="1", boot=manifest.boot)
    async with daemon.client() as client:
        await client.plugins.install(manifest)
        await boot(client, EVIL, plugin="with-disk")
        async with noticing(daemon, client) as noticed:
            fill = partial(client.vms.exec, EVIL, ["dd", "if=/dev/urandom", "of=/full", "bs=65536"])
            for _ in range(3):
                async with fill(timeout_s=120) as process:
                    async for _piece in process:
                        pass
                assert process.end is not None
                assert process.end.exit_code == 1, "it is full"
            async with client.vms.exec(EVIL, ["sync"], timeout_s=60) as process:
                async for _piece in process:
                    pass
            (layer,) = daemon.disks()
            taken_mb = layer_of(layer).stat().st_blocks * 512 / 2**20
            print(f"the layer takes {taken_mb:.1f} of {size_mb} MiB")
            assert size_mb / 2 < taken_mb < size_mb + 2
            await delete_evil(client, noticed)
        check(noticed)
        assert not daemon.disks()
        await client.plugins.delete("with-disk")
