"""Settings for the tests of volant/vm."""

from __future__ import annotations

from pathlib import Path

from volant.vm import VmSettings


def vm_settings(cache_dir: Path) -> VmSettings:
    """Returns settings whose other directories need not exist."""
    return VmSettings(
        state_dir=Path("/state"),
        runtime_dir=Path("/run"),
        cache_dir=cache_dir,
        memory_dir=Path("/shm"),
        disk_dir=Path("/state/disks"),
        template_dir=Path("/state/templates"),
        snapshot_dir=Path("/state/snapshots"),
        volume_dir=Path("/state/volumes"),
    )
