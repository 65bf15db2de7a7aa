"""The key of a template, which decides which VMs can be cloned from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from volant.hypervisor import AcceleratorName


class GuestConfig(msgspec.Struct, frozen=True):
    """The configuration of a guest before it became a template."""

    manifest: dict[str, Any]
    workload: dict[str, Any]
    """The workload, with the VM's own environment."""


class TemplateKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that determines a guest's state. It is independent of any VM."""

    hypervisor: str
    """The hypervisor's version, machine type and device order; see `Hypervisor.fingerprint`."""
    kernel: str
    initramfs: str
    """A digest, or another value that changes with the file; `kernel` likewise."""
    rootfs: str | None
    """The base of its disk: the digest of a root filesystem, or `image` and the digest of an OCI image; None without a
    disk."""
    cmdline: str
    """The kernel command line, without additions by the hypervisor's driver."""
    cpu_cores: int
    memory_mb: int
    disk_mb: int | None = None
    """The size of its disk; None for the size of the root filesystem."""
    has_nic: bool = False
    """Whether its machine has a network interface, which each clone configures for itself."""
    config: GuestConfig | None = msgspec.field(default=None, name="told")
    """None if each clone receives its manifest and its workload itself. Its name in files and digests is `told`."""

    @property
    def digest(self) -> str:
        """The template's name: 32 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:32]


class TemplateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A key, and the paths of its parts on this host."""

    key: TemplateKey
    digest: str
    plugin: str
    """The plugin of the requesting VM, or the reference of its OCI image. VMs of other plugins may be cloned from the
    template too."""
    kernel: Path
    initramfs: Path
    rootfs: Path | None
    """None if there is none, or an OCI image in its place."""
    image: Path | None = None
    """The disk of its OCI image."""
    accelerator: AcceleratorName
