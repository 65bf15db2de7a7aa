"""Fixtures of the tests of a guest without a daemon, whose modules define its `spec`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hypervisor.kit import real_qemu
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import QemuHypervisor


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
async def qemu(host: Host, spec: MachineSpec, tmp_path: Path) -> AsyncIterator[QemuHypervisor]:
    async with real_qemu(host, spec, tmp_path / "cache") as hypervisor:
        yield hypervisor
