"""Fixtures: QEMU and the spec of a small machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hypervisor.kit import real_qemu, tiny_spec
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import QemuHypervisor


@pytest.fixture
def host() -> Host:
    return Host(users=range(65536, 98304))


@pytest.fixture
def spec(host: Host, tmp_path: Path) -> MachineSpec:
    return tiny_spec(host, tmp_path)


@pytest.fixture
async def qemu(host: Host, spec: MachineSpec, tmp_path: Path) -> AsyncIterator[QemuHypervisor]:
    async with real_qemu(host, spec, tmp_path / "cache") as hypervisor:
        yield hypervisor
