"""The daemon's settings that VMs depend on."""

from __future__ import annotations

from pathlib import Path

import msgspec


class VmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Directories, limits and deadlines of VMs."""

    state_dir: Path
    runtime_dir: Path
    cache_dir: Path
    memory_dir: Path
    """On a file system in RAM."""
    disk_dir: Path
    """Holds VMs' layers over their root filesystems; as durable as the database."""
    template_dir: Path
    snapshot_dir: Path
    """As durable as the database."""
    volume_dir: Path
    """As durable as the database."""
    kernel: Path | None = None
    initramfs: Path | None = None
    """Replaces the built image's where a plugin brings none, as `kernel` does."""
    max_vms: int | None = None
    memory_overcommit: float = 1.0
    """How many times the host's memory may be promised to VMs."""
    return_memory: bool = True
    """Whether memory that a guest frees goes back to the host, where the guest's memory is its own."""
    nameservers: tuple[str, ...] = ()
    """DNS servers for guests with a network interface."""
    image_timeout_s: float = 300.0
    launch_timeout_s: float = 30.0
    agent_timeout_s: float = 120.0
    kill_timeout_s: float = 30.0

    def without_directories(self, text: str) -> str:
        """Returns a text for clients, with names in place of the daemon's directories: where these are on the host is
        its administrators' to know."""
        for name in ("memory_dir", "state_dir", "runtime_dir", "cache_dir"):
            text = text.replace(str(getattr(self, name)), f"<{name}>")
        return text
