"""What VMs use of the host, and the memory of a VM as the guest and the host see it."""

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


class VmStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM's hypervisor has used of the host since it was started: for its guest and for itself."""

    name: str
    cpu_cores: int
    memory_mb: int
    """The memory of the VM."""
    clock_s: float
    """When this was measured, on a clock of the host that does not jump: two measurements give a rate."""
    cpu_s: float
    """Processor time."""
    rss_mb: float
    """Resident memory. Memory that clones share counts for each."""
    disk_read_bytes: int
    """Read from the host's disks; what was in its page cache does not count."""
    disk_written_bytes: int
    received_bytes: int | None
    """What the VM has received over its network interface; null if the host does not count that: there is none, or it
    is of the kind `user`."""
    sent_bytes: int | None
