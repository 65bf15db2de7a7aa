"""DELETE answers 204 only when the VM's hypervisor has ended, whatever other local users run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.attackers.local_user import needs_root, running_code
from tests.system.kit import Daemon, boot

pytestmark = [pytest.mark.system, needs_root]

WAITING = "import time; print('ready', flush=True); time.sleep(600)"


async def test_delete_kills_the_hypervisor_and_not_the_decoy(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    with running_code(WAITING, f"{daemon.tag_prefix}1.1") as decoy:
        async with daemon.client() as client:
            vm = await boot(client, "demo")
            assert vm.pid != decoy.pid
            assert await client.system.orphans() == []
            await client.vms.delete("demo")
            assert vm.pid not in daemon.hypervisors(), "204, and the hypervisor runs"
        assert decoy.poll() is None, "the daemon has ended another user's process"


async def test_a_decoy_is_not_adopted_after_a_restart(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    async with daemon.client() as client:
        vm = await boot(client, "demo")
    daemon.kill()
    with (
        running_code(WAITING, f"{daemon.tag_prefix}1.1") as same,
        running_code(WAITING, f"{daemon.tag_prefix}2.1") as another,
    ):
        daemon.start()
        async with daemon.client() as client:
            assert (await client.vms.get("demo")).pid == vm.pid
            assert await client.system.orphans() == []
            await client.vms.delete("demo")
            assert vm.pid not in daemon.hypervisors(), "204, and the hypervisor runs"
            assert [each.poll() for each in (same, another)] == [None, None]
