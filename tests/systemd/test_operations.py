"""What an operator does under a real systemd: maintenance with a guest, a dump into the journal."""

from __future__ import annotations

import trio

from tests.system.kit import BOOT_S, boot
from tests.systemd.kit import Box


async def test_maintenance_sets_guests_aside_and_brings_them_back(box: Box) -> None:
    box.volar("setup")
    async with box.client() as client:
        await boot(client, "demo")

        # What runs goes on, and whoever waits for the end of it is told.
        late = box.volar("system", "drain", "--wait", "--timeout", "1s", check=False)
        assert late.returncode == 124
        assert "1 VM is up: demo" in late.stderr
        assert (await client.vms.get("demo")).status == "running"
        assert box.show("volantd.service", "SubState") == "running"

        box.volar("system", "drain", "--stop-vms", "--wait")
        assert (await client.vms.get("demo")).status == "stopped"
        assert box.scopes() == []

    box.systemctl("restart", "volantd.service")
    assert "draining" in box.show("volantd.service", "StatusText")
    refused = box.volar("vms", "start", "demo", check=False)
    assert refused.returncode == 1
    assert "is draining for maintenance since" in refused.stderr
    assert "volar system undrain" in refused.stderr
    assert "draining since:" in box.volar("system", "status").stdout
    assert box.scopes() == []

    box.volar("system", "undrain")
    async with box.client() as client:
        with trio.fail_after(BOOT_S):
            assert (await client.vms.wait("demo", timeout_s=BOOT_S)).outcome == "met"
        assert (await client.vms.get("demo")).boots == 2
    assert "draining" not in box.volar("system", "status").stdout
    box.volar("vms", "delete", "demo")


def test_a_signal_dumps_into_the_journal(box: Box) -> None:
    box.volar("setup")
    pid = box.show("volantd.service", "MainPID")
    box.systemctl("kill", "--signal=SIGUSR1", "--kill-whom=main", "volantd.service")
    box.until(lambda: any("all tasks:" in text for text in box.said("SYSLOG_IDENTIFIER=volantd")), 30)
    tasks = "".join(str(entry["MESSAGE"]) for entry in box.journal("LOGGER=volant.tasks"))
    assert "volant/daemon/_daemon.py" in tasks
    assert any("Current thread" in text for text in box.said("_SYSTEMD_UNIT=volantd.service"))
    assert box.show("volantd.service", "MainPID") == pid
