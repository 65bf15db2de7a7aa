"""As a service the daemon opens the files that its clients name, with their rights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.kit import boot, run
from tests.system.rootfs import digest, make_ext4, plugin
from tests.systemd.kit import Box
from volant.model import Artifact


@pytest.mark.full
async def test_a_plugin_names_an_image_of_the_host(box: Box, image_cache: Path) -> None:
    image = make_ext4(box.root / "var/image.ext4", image_cache, files={"etc/word": "kept"})
    box.volar("setup")
    there = Path("/var", image.name)
    (box.root / "var/link").symlink_to(there)
    for name, path in (("disk", there), ("linked", Path("/var/link"))):
        async with box.client() as client:
            await client.plugins.install(plugin(name, Artifact(str(path), digest(image))))
            await boot(client, name, plugin=name)
            assert await run(client, name, "cat", "/etc/word") == "kept"
