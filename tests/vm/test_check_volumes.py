"""A boot opens a volume only if its guest can use it: one that was not unmounted needs a writer first."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from tests.vm.kit import vm_settings
from volant.host import Host
from volant.model import CreateVm, Manifest, VmRow, Volume, new_row
from volant.vm._machine_spec import check_volumes
from volant.vm.messages import StepError
from volant.volumes import VolumeFiles

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(
        shutil.which("mke2fs") is None or shutil.which("debugfs") is None, reason="e2fsprogs is not installed"
    ),
]

NOW = datetime(2026, 1, 2, tzinfo=UTC)
VOLUME = Volume(id="0123456789abcdef", name="data", size_mb=64, created_at=NOW)


def row(mount: str) -> VmRow:
    request = CreateVm(name="demo", cpu_cores=1, memory_mb=128, volumes=(mount,))
    made = new_row(request, Manifest(name="default"), vm_id=7, now=NOW)
    return replace(made, volumes=tuple(replace(each, id=VOLUME.id) for each in made.volumes))


async def refusal(directory: Path, mount: str) -> str | None:
    """Why a VM that mounts the volume does not boot; None if it does."""
    settings = replace(vm_settings(directory), volume_dir=directory)
    try:
        await check_volumes(Host(), settings, row(mount))
    except StepError as error:
        return error.code
    return None


async def test_a_volume_that_was_not_unmounted_is_refused_to_a_reader_and_not_to_a_writer(tmp_path: Path) -> None:
    files = VolumeFiles(Host(), tmp_path)
    await files.make(VOLUME)
    assert await refusal(tmp_path, "data:/d:ro") is None
    # The kernel sets this feature at a mount to write, and clears it as it unmounts.
    for feature, reader in (("needs_recovery", "volume_not_clean"), ("-needs_recovery", None)):
        command = ["debugfs", "-w", "-R", f"feature {feature}", str(files.path(VOLUME))]
        await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        assert (await refusal(tmp_path, "data:/d:ro"), await refusal(tmp_path, "data:/d")) == (reader, None)


async def test_a_volume_without_its_file_is_refused_to_all(tmp_path: Path) -> None:
    for mount in ("data:/d:ro", "data:/d"):
        assert await refusal(tmp_path, mount) == "volume_missing"
