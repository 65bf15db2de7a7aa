"""The memory of a VM, as the guest and the host see it."""

from __future__ import annotations

import msgspec


class GuestMemory(msgspec.Struct, frozen=True):
    """A guest's memory as its kernel sees it, in MiB."""

    total_mb: int
    """Less than the VM has, as the kernel itself does not count."""
    available_mb: int
    """For programs. Includes caches that can be dropped."""


class HostMemory(msgspec.Struct, frozen=True):
    """The host's memory that a VM's hypervisor uses, in MiB: for its guest and for itself."""

    rss_mb: float
    """All resident memory."""
    pss_mb: float
    """Shared memory counts in proportion, so the sum over VMs is what they use together."""
    private_mb: float
    """Memory that is not shared."""
    shared_mb: float
    """Memory that is shared. For a clone mostly pages of its template that it has not written."""


class VmMemory(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/vms/{name}/memory`."""

    memory_mb: int
    """The memory of the VM. The host has room for all of it."""
    guest: GuestMemory | None
    """Null if the VM does not run or its agent does not answer in time."""
    host: HostMemory
