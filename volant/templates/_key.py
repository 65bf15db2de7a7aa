"""What a template is made of, and so what may go on from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from volant.hypervisor import AcceleratorName


class GuestConfig(msgspec.Struct, frozen=True):
    """What a guest was told before it became a template."""

    manifest: dict[str, Any]
    """As the agent gets it."""
    workload: dict[str, Any]
    """Likewise, the VM's own environment in it."""


class TemplateKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a guest's state follows from. Nothing of it names a VM."""

    hypervisor: str
    """Its version, the kind of machine, the order of its devices; see `Hypervisor.fingerprint`."""
    kernel: str
    initramfs: str
    """Digests, or whatever else changes with the file."""
    rootfs: str | None
    cmdline: str
    """The kernel's, beside what the hypervisor's driver puts there."""
    cpu_cores: int
    memory_mb: int
    disk_mb: int | None = None
    """How large its disk is; None: as large as the root filesystem."""
    has_nic: bool = False
    """Whether its machine has a network interface. What stands on that is each clone's own."""
    config: GuestConfig | None = msgspec.field(default=None, name="told")
    """None: nothing yet, and each clone hears of its plugin and its workload itself."""

    @property
    def digest(self) -> str:
        """The template's name: 32 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:32]


class TemplateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A key, and where on this host its parts lie."""

    key: TemplateKey
    digest: str
    plugin: str
    """Of the VM for which it is asked; others may be served by it too."""
    kernel: Path
    initramfs: Path
    rootfs: Path | None
    accelerator: AcceleratorName
