"""A service serves host directories with the units as they are, and what the how-to page adds to them."""

from __future__ import annotations

import pytest

from tests.system.kit import adopted, boot, run
from tests.systemd.kit import Box
from volant.directories import find_program

pytestmark = pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd")
OWNER = "1234"
SETUP = f"""
mkdir -p /srv/data /srv/results /etc/systemd/system/volantd.service.d /etc/default
echo data >/srv/data/file
chown {OWNER} /srv/results
printf '[Service]\\nReadWritePaths=/srv/results\\n' >/etc/systemd/system/volantd.service.d/directories.conf
echo VOLANT_HOST_DIRS=/srv/data,/srv/results:rw >/etc/default/volantd
"""


@pytest.mark.full
async def test_a_service_reads_and_writes_as_the_owner_with_the_path_of_the_page(box: Box) -> None:
    box.run("sh", "-ec", SETUP)
    box.volar("setup")
    async with box.client() as client:
        await boot(client, "demo", volumes=("/srv/data:/data", "/srv/results:/results:rw"))
        assert await run(client, "demo", "cat", "/data/file") == "data\n"
        await run(client, "demo", "sh", "-c", "echo done >/results/log; ! chmod u+s /results/log")
        assert box.run("stat", "-c", "%u %s", "/srv/results/log").stdout.split() == [OWNER, "5"]
        # That of the hypervisor, and those of each virtiofsd.
        assert len(box.scopes()) == 3
        box.run("systemctl", "restart", "volantd.service")
        await adopted(client)
        assert await run(client, "demo", "cat", "/results/log") == "done\n"
        await client.vms.delete("demo")
    assert box.scopes() == []
