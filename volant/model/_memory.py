"""What a VM takes of memory, as the guest sees it and as the host does."""

from __future__ import annotations

import msgspec


class GuestMemory(msgspec.Struct, frozen=True):
    """A guest's memory as its kernel sees it, in MiB."""

    total_mb: int
    """Less than the VM has, as the kernel itself is not in it."""
    available_mb: int
    """What programs can still have; caches that can be dropped are in it."""


class HostMemory(msgspec.Struct, frozen=True):
    """What a VM's hypervisor takes of the host's memory, in MiB: its guest's memory as far as it is there, and its
    own."""

    rss_mb: float
    """All that is there."""
    pss_mb: float
    """Likewise, what is shared counted by its part: the sum over VMs is what they take together."""
    private_mb: float
    """What nobody else has."""
    shared_mb: float
    """What others have too. Of a clone that is above all its template's memory, as long as it has not written there."""


class VmMemory(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/vms/{name}/memory`."""

    memory_mb: int
    """What the VM was given; the host has room for all of it."""
    guest: GuestMemory | None
    """Null when it does not run, or its agent does not answer in time."""
    host: HostMemory
