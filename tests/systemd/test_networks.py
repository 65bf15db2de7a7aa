"""As a service the daemon may do little to a host, and that is enough for networks of VMs."""

from __future__ import annotations

import pytest

from tests.system.kit import boot, run
from tests.systemd.kit import Box


@pytest.mark.full
async def test_a_vm_on_the_bridge_reaches_its_gateway_and_leaves_nothing(box: Box) -> None:
    box.volar("setup")
    async with box.client() as client:
        one = await boot(client, "one", network="bridge")
        gateway = f"{one.ip_address.rpartition('.')[0]}.1"

        assert "0% packet loss" in await run(client, "one", "ping", "-c", "1", gateway)
        there = interfaces(box)
        await client.vms.delete("one")

        assert len(there - interfaces(box)) == 1
    assert not [text for text in box.said() if "network" in text and "can't" in text]


def interfaces(box: Box) -> set[str]:
    lines = box.run("cat", "/proc/net/dev").stdout.splitlines()
    return {line.partition(":")[0].strip() for line in lines if ":" in line}
