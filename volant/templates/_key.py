"""What a template is made of, and so which VMs can go on from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from volant.hypervisor import AcceleratorName


class GuestConfig(msgspec.Struct, frozen=True):
    """What a guest was configured with before it became a template."""

    manifest: dict[str, Any]
    workload: dict[str, Any]
    """With the VM's own environment."""


class TemplateKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a guest's state follows from. It names no VM."""

    hypervisor: str
    """Its version, the kind of machine, the order of its devices; see `Hypervisor.fingerprint`."""
    kernel: str
    initramfs: str
    """A digest, or what else changes with the file; as `kernel`."""
    rootfs: str | None
    """What its disk begins with: the digest of a root filesystem, or `image` and that of an OCI image; None: it has no
    disk."""
    cmdline: str
    """The kernel's, without what the hypervisor's driver adds."""
    cpu_cores: int
    memory_mb: int
    disk_mb: int | None = None
    """The size of its disk; None: that of the root filesystem."""
    has_nic: bool = False
    """Whether its machine has a network interface, which each clone configures for itself."""
    config: GuestConfig | None = msgspec.field(default=None, name="told")
    """None: nothing; each clone gets its manifest and its workload itself. Named `told` in files and digests."""

    @property
    def digest(self) -> str:
        """The template's name: 32 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:32]


class TemplateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A key, and where its parts lie on this host."""

    key: TemplateKey
    digest: str
    plugin: str
    """The plugin of the VM that asks, or the reference of its OCI image; VMs of others may go on from the template,
    too."""
    kernel: Path
    initramfs: Path
    rootfs: Path | None
    """None: it has none, or an OCI image in its place."""
    image: Path | None = None
    """The disk of its OCI image."""
    accelerator: AcceleratorName
