"""Admission: whether the host has room for one more VM.

A VM counts with all the memory that it may take, though most take less: a host that promises more than it has kills
hypervisors when guests use what they were promised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from volant import images
from volant.host import Host
from volant.journal import Projection
from volant.model import FORK, CreateVm, Manifest, Problem, Status, VmRow, invalid
from volant.templates import WarmPool

from ._machine_spec import uses_image
from ._settings import VmSettings

OVERHEAD_MB = 192
"""What a hypervisor's process needs beside its guest's memory."""
CEILING_MB = 2 * OVERHEAD_MB
"""What it may take at most."""
_HOST_RESERVE_MB = 512
"""Kept for the host itself."""
_DISK_RESERVE_MB = 128
"""Kept on the disk for the database and the logs."""


@dataclass
class Capacity:
    """The room for VMs on one host."""

    host: Host
    projection: Projection
    warm_pool: WarmPool
    settings: VmSettings
    _reserved: list[int] = field(default_factory=list)
    """The memory of VMs whose rows are being written, in MiB."""
    _closed: bool = False

    @property
    def is_reserved(self) -> bool:
        """Whether the row of a VM is being written."""
        return bool(self._reserved)

    def close(self) -> None:
        """Admits no more VMs: all are being deleted."""
        self._closed = True

    @contextmanager
    def reserve(self, memory_mb: int, count: int = 1) -> Iterator[None]:
        """Reserves room for `count` VMs of that size, for the block in which their rows are written.

        :raises Problem: 503 the host has no room.
        """
        reserved = 0
        try:
            for _ in range(count):
                self.admit(memory_mb)
                # At once, as others ask while the journal writes.
                self._reserved.append(memory_mb)
                reserved += 1
            yield
        finally:
            for _ in range(reserved):
                self._reserved.remove(memory_mb)

    def admit(self, memory_mb: int, *, besides: int | None = None) -> None:
        """Checks that there is room for one more VM. `besides`: the id of a VM that does not count.

        :raises Problem: 503 there is no room, or all VMs are being deleted.
        """
        if self._closed:
            raise Problem(503, "daemon-stopping", "the daemon stops, and its VMs with it")
        rows = [row for row in self.projection.rows() if row.id != besides]
        limit = self.settings.max_vms
        if limit is not None and len(rows) + len(self._reserved) >= limit:
            raise Problem(
                503, "no-capacity", f"there are {len(rows)} VMs, and VOLANT_MAX_VMS allows {limit}",
                hint="delete one, or raise the limit",
            )  # fmt: skip
        needed = memory_mb + OVERHEAD_MB
        total, available = self.host.machine.memory_total_mb(), self.host.machine.memory_available_mb()
        reserved = sum(mb + OVERHEAD_MB for mb in self._reserved)
        promised = promised_mb(rows) + reserved
        unpromised = max(0, total - _HOST_RESERVE_MB - promised)
        if needed > unpromised:
            raise Problem(
                503, "no-capacity",
                f"the VM needs {needed} MiB, and {unpromised} of the host's {total} MiB are not promised yet: "
                f"{promised} MiB are promised to VMs that are up or about to be, and {_HOST_RESERVE_MB} MiB are kept "
                f"for the host ({available} MiB are available now, as VMs do not use all that is promised to them)",
                hint="stop or delete a VM, or ask for less memory_mb",
            )  # fmt: skip
        if self.warm_pool.tags:
            # The pool gives way, and frees more than may be missing.
            return
        # Other programs may have taken what is promised to no VM.
        spare = self.host.machine.spare_memory_mb(self.settings.memory_dir)
        spare = max(0, spare - about_to_take_mb(rows) - reserved)
        if needed > spare:
            raise Problem(
                503, "no-capacity",
                f"the VM needs {needed} MiB, and {spare} of the host's {total} MiB can be had now: {available} MiB are "
                f"available, and VMs that are up or about to be may take {max(0, available - spare)} MiB of these; the "
                f"rest is used by them and by other programs ({promised} MiB are promised to VMs)",
                hint="stop or delete a VM, end other programs, or ask for less memory_mb",
            )  # fmt: skip

    def check_disk(self, request: CreateVm) -> None:
        """:raises Problem: 503 the host's disk has no room for the VM's."""
        plugin = self.projection.plugins.get(request.plugin)
        boot = plugin.manifest.boot if plugin is not None else None
        if boot is None or boot.rootfs is None:
            return
        directory = self.settings.disk_dir
        try:
            free_mb = self.host.disk.free(directory) // 2**20
        except OSError as error:
            raise Problem(503, "no-capacity", f"{directory} can't be read: {error.strerror}") from error
        needed_mb = (request.disk_mb or 0) + _DISK_RESERVE_MB
        if needed_mb > free_mb:
            raise Problem(
                503, "no-capacity",
                f"the VM's disk may take {request.disk_mb or 'some'} MiB, and {free_mb} MiB are left in {directory}, "
                f"of which {_DISK_RESERVE_MB} are the daemon's own",
                hint="delete a VM or a snapshot, make room, or ask for less disk_mb",
            )  # fmt: skip

    async def check_image(self, memory_mb: int, manifest: Manifest) -> None:
        """:raises Problem: 400 the boot image needs more memory. An image that is not built yet says so later."""
        if not uses_image(self.settings, manifest):
            return
        image = await self.host.threads.run(images.find, self.settings.cache_dir)
        if image is not None and memory_mb < image.min_memory_mb:
            raise invalid(
                "memory_mb", f"memory_mb {memory_mb} is too little: the boot image needs at least {image.min_memory_mb}"
            )


def promised_mb(rows: Iterable[VmRow]) -> int:
    """Returns what VMs that are up, or about to be, may take of the host's memory at most.

    Clones count in full, as they may write to all they have. The memory of a fork's checkpoint counts, too, as long as
    one of its copies runs.
    """
    up = [row for row in rows if row.tag or row.status in (Status.PENDING, Status.STARTING)]
    forks = {origin: row.memory_mb for row in up if (origin := row.checkpoint or row.template or "").startswith(FORK)}
    return sum(row.memory_mb + OVERHEAD_MB for row in up) + sum(forks.values())


def about_to_take_mb(rows: Iterable[VmRow]) -> int:
    """Returns what of that VMs will take that have no process yet."""
    up = (row for row in rows if row.process is None and row.status in (Status.PENDING, Status.STARTING))
    return sum(row.memory_mb + OVERHEAD_MB for row in up)
