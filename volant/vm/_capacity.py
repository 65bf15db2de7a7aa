"""Admission: whether the host has room for one more VM.

Each VM has a promise: the most memory that it may take. As long as the promises of all VMs fit the host, none can fail.
Most VMs take far less, so with `memory_overcommit` the host may promise more than it has, as long as enough stays free
for what VMs may still take. `docs/explanation/vm.md` has the rule and its reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import ceil, floor, inf
from typing import NamedTuple

import msgspec
import trio

from volant import images
from volant.host import Host
from volant.journal import Projection
from volant.model import FORK, BootMode, CreateVm, Manifest, Problem, Status, VmRow, invalid, mounts_of, size_of
from volant.templates import TemplateStore, WarmPool

from ._layout import VmSettings
from ._machine_spec import uses_image

OVERHEAD_MB = 192
"""Memory of a hypervisor's process besides its guest's memory."""
CEILING_MB = 2 * OVERHEAD_MB
"""The limit for this memory."""
IDLE_MB = 48
"""Memory of a hypervisor's process once its guest is idle, with the pages that a clone's guest has written. Measured
under TCG: 44."""
_HOST_RESERVE_MB = 512
"""Memory that stays free for the host itself."""
_DISK_RESERVE_MB = 128
"""Disk space that stays free for the database and the logs."""
_IMAGE_S = 10.0
"""How long the boot image's size is cached. To find it takes a millisecond, and each boot checks it again."""
_RETRY_AFTER_S = 10
"""The kernel's figure of memory pressure is an average over this many seconds."""


class MemoryNeed(NamedTuple):
    """The memory that one VM takes of the host, in MiB."""

    at_start: int
    """Memory that it takes as soon as it runs. A VM that boots cold takes all of its guest's memory."""
    promised: int
    """The most memory that it may take."""

    @property
    def growth(self) -> int:
        """The memory that it may take later."""
        return self.promised - self.at_start


def memory_need(memory_mb: int, *, clone: bool) -> MemoryNeed:
    """Returns the memory that a VM of that size takes. `clone` means that it continues from a template or a
    checkpoint."""
    return MemoryNeed(IDLE_MB + (0 if clone else memory_mb), memory_mb + OVERHEAD_MB)


class _Room(NamedTuple):
    """The memory that a host has for one more VM, and how it was counted, in MiB."""

    total: int
    available: int
    returned: int
    """Memory that guests have returned and may take again."""
    promised: int
    unpromised: int
    spare_in_full: int
    """Memory left after starting VMs have taken all that they may."""
    to_start: int
    """Memory that starting VMs take as soon as they run."""
    spare: int
    """Memory left after `to_start` and the memory for the host. Negative if there is too little."""
    growths: list[int]
    """Memory that each VM that is up may take later."""

    @property
    def in_full(self) -> int:
        """The memory that one more VM can be promised if every promise must be kept."""
        return min(self.unpromised, self.spare_in_full)


class Capacity(msgspec.Struct):
    """The room for VMs on one host."""

    host: Host
    projection: Projection
    templates: TemplateStore
    warm_pool: WarmPool
    settings: VmSettings
    _reserved: list[MemoryNeed] = msgspec.field(default_factory=list)
    """The needs of VMs whose rows are being written."""
    _closed: bool = False
    _image: images.Image | None = None
    _image_at: float = -inf

    @property
    def is_reserved(self) -> bool:
        """Whether the row of a VM is being written."""
        return bool(self._reserved)

    def close(self) -> None:
        """Admits no more VMs: all are being deleted."""
        self._closed = True

    def need_of_request(self, request: CreateVm, manifest: Manifest | None) -> MemoryNeed:
        """Returns the memory that a new VM will take. `manifest`: None if there is no such plugin."""
        if manifest is None:
            # The journal refuses the request.
            return memory_need(request.memory_mb or 0, clone=False)
        cpu_cores, memory_mb = size_of(request, manifest)
        source = request.plugin if manifest.image is None else manifest.image.reference
        clone = not request.volumes and self._boots_from_template(request.boot, source, cpu_cores, memory_mb)
        return memory_need(memory_mb, clone=clone)

    @contextmanager
    def reserve(self, need: MemoryNeed, count: int = 1) -> Iterator[None]:
        """Reserves room for `count` such VMs, for the block in which their rows are written. :raises Problem: 503, the
        host has no room."""
        reserved = 0
        try:
            for _ in range(count):
                self._admit(need)
                # At once, as others ask while the journal writes.
                self._reserved.append(need)
                reserved += 1
            yield
        finally:
            for _ in range(reserved):
                self._reserved.remove(need)

    def admit_again(self, row: VmRow) -> None:
        """Checks that there is room for a stopped VM. :raises Problem: 503, there is none."""
        # It has a disk since its first boot, which a template's memory does not fit. A template has no volumes.
        cold = row.layer or mounts_of(row)
        clone = not cold and self._boots_from_template(row.boot, row.source, row.cpu_cores, row.memory_mb)
        self._admit(memory_need(row.memory_mb, clone=clone), besides=row.id)

    def _admit(self, need: MemoryNeed, *, besides: int | None = None) -> None:
        """Checks that there is room for one more VM. `besides` is the id of a VM that does not count.

        :raises Problem: 503, there is no room, or all VMs are being deleted.
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
        self._check_pressure()
        self._check_memory(need, rows)

    def _check_pressure(self) -> None:
        """Checks the memory pressure. :raises Problem: 503, programs wait for memory, so one more VM would slow down
        all."""
        machine = self.host.machine
        if machine.is_short_of_memory():
            raise Problem(
                503, "no-capacity",
                f"the host is short of memory: programs waited for it for {machine.memory_pressure():.0%} of the last "
                f"ten seconds, and {machine.memory_available_mb()} of {machine.memory_total_mb()} MiB are available",
                hint="try again later; stop or delete a VM, or end other programs, if it lasts",
                retry_after_s=_RETRY_AFTER_S,
            )  # fmt: skip

    def _check_memory(self, need: MemoryNeed, rows: list[VmRow]) -> None:
        """Checks that the memory of the host is sufficient. :raises Problem: 503, it is not."""
        room, ratio = self._room(rows), self.settings.memory_overcommit
        if need.promised <= room.in_full:
            return
        if ratio <= 1:
            raise _in_full(need, room)

        growths = [*room.growths, need.growth]
        # One VM alone may take all that it was promised.
        reserve = max(ceil(sum(growths) / ratio), *growths)
        left = room.spare - reserve
        if need.at_start > left:
            raise Problem(
                503, "no-capacity",
                f"the VM takes {need.at_start} MiB when it starts, up to {need.promised} later, and {max(0, left)} MiB "
                f"can be had: {room.available} of the host's {room.total} MiB are available; of these "
                f"{_HOST_RESERVE_MB} are kept for the host, {room.to_start} for VMs that start, {room.returned} for "
                f"guests that gave memory back, and {reserve} in reserve for what VMs may take later, up to "
                f"{sum(growths)} with this one (memory_overcommit {ratio:g})",
                hint="stop or delete a VM, end other programs, or ask for less memory_mb",
            )  # fmt: skip

    def free_memory_mb(self) -> int:
        """Returns the largest `memory_mb` that is admitted now. With overcommit that is a clone's: a VM that boots cold
        may get less."""
        room, ratio = self._room(self.projection.rows()), self.settings.memory_overcommit
        most = room.in_full
        if ratio > 1:
            # See `_check_memory`: what the clone does not take at its start has to fit as its growth.
            spare = room.spare - IDLE_MB
            if max(room.growths, default=0) <= spare:
                most = max(most, IDLE_MB + min(spare, floor(spare * ratio) - sum(room.growths)))
        return max(0, most - OVERHEAD_MB)

    def _room(self, rows: list[VmRow]) -> _Room:
        machine = self.host.machine
        total, available = machine.memory_total_mb(), machine.memory_available_mb()
        starting = [self._need_of(row) for row in rows if _is_about_to_start(row)] + self._reserved
        # Guests that gave memory back may take it again, and the warm pool gives way.
        returned = max(0, available - machine.spare_memory_mb(self.settings.memory_dir))
        spare = available - returned + IDLE_MB * len(self.warm_pool.tags)
        promised = promised_mb(rows) + sum(each.promised for each in self._reserved)
        to_start = sum(each.at_start for each in starting)
        return _Room(
            total=total,
            available=available,
            returned=returned,
            promised=promised,
            unpromised=max(0, total - _HOST_RESERVE_MB - promised),
            spare_in_full=max(0, spare - sum(each.promised for each in starting)),
            to_start=to_start,
            spare=spare - _HOST_RESERVE_MB - to_start,
            growths=[need.growth for need in (*map(self._need_of, filter(_is_up, rows)), *self._reserved)],
        )

    def _need_of(self, row: VmRow) -> MemoryNeed:
        clone = row.template is not None or row.checkpoint is not None
        cold = mounts_of(row) or row.fallback is not None or (row.layer and row.boots)
        if not row.tag and not clone and not cold:
            # The source of its boot is not decided yet.
            clone = self._boots_from_template(row.boot, row.source, row.cpu_cores, row.memory_mb)
        return memory_need(row.memory_mb, clone=clone)

    def _boots_from_template(self, boot: BootMode, source: str, cpu_cores: int, memory_mb: int) -> bool:
        """Returns whether such a VM will be a clone, according to the present templates. If it boots cold after all and
        lacks the memory for that, only this VM fails, with `memory_refused`."""
        return boot == "template" or (boot == "auto" and self.templates.has(source, cpu_cores, memory_mb))

    def free_disk_mb(self) -> int:
        """Returns the room for disks of VMs; 0 if it is unknown."""
        try:
            return max(0, self.host.disk.free(self.settings.disk_dir) // 2**20 - _DISK_RESERVE_MB)
        except OSError:
            return 0

    def check_disk(self, request: CreateVm, manifest: Manifest) -> None:
        """Checks that the host's disk has room for the VM's. :raises Problem: 503, it has not."""
        if manifest.boot is None or not manifest.boot.has_disk:
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
        """Checks the VM's memory against the boot image's minimum, if the image is already built. :raises Problem: 400,
        the boot image needs more memory."""
        if not uses_image(self.settings, manifest):
            return
        now = trio.current_time()
        if self._image is None or now - self._image_at >= _IMAGE_S:
            self._image_at, self._image = now, await self.host.threads.run(images.find, self.settings.cache_dir)
        image = self._image
        if image is not None and memory_mb < image.min_memory_mb:
            raise invalid(
                "memory_mb", f"memory_mb {memory_mb} is too little: the boot image needs at least {image.min_memory_mb}"
            )


def promised_mb(rows: Iterable[VmRow]) -> int:
    """Returns the most memory that VMs that are up may take of the host.

    Clones count in full, as they may write to all of their memory. The memory of a fork's checkpoint counts too, as
    long as one of its copies runs.
    """
    up = [row for row in rows if _is_up(row)]
    forks = {origin: row.memory_mb for row in up if (origin := row.checkpoint or row.template or "").startswith(FORK)}
    return sum(row.memory_mb + OVERHEAD_MB for row in up) + sum(forks.values())


def _is_up(row: VmRow) -> bool:
    return bool(row.tag) or row.status in (Status.PENDING, Status.STARTING)


def _is_about_to_start(row: VmRow) -> bool:
    return row.process is None and row.status in (Status.PENDING, Status.STARTING)


def _in_full(need: MemoryNeed, room: _Room) -> Problem:
    """Returns the refusal of a host that promises no more memory than it has."""
    if need.promised > room.unpromised:
        return Problem(
            503, "no-capacity",
            f"the VM needs {need.promised} MiB, and {room.unpromised} of the host's {room.total} MiB are not promised "
            f"yet: {room.promised} MiB are promised to VMs that are up or about to be, and {_HOST_RESERVE_MB} MiB are "
            f"kept for the host ({room.available} MiB are available now, as VMs do not use all that is promised to "
            "them)",
            hint="stop or delete a VM, ask for less memory_mb, or set memory_overcommit",
        )  # fmt: skip
    # Other programs have taken what is promised to no VM.
    return Problem(
        503, "no-capacity",
        f"the VM needs {need.promised} MiB, and {room.spare_in_full} of the host's {room.total} MiB can be had now: "
        f"{room.available} MiB are available, and VMs that are up or about to be may take "
        f"{max(0, room.available - room.spare_in_full)} MiB of these; the rest is used by them and by other programs "
        f"({room.promised} MiB are promised to VMs)",
        hint="stop or delete a VM, end other programs, or ask for less memory_mb",
    )  # fmt: skip
