"""The files of volumes: one sparse file each, with an ext4 filesystem.

A file is created under another name, and renamed once it is completely on the disk. So a file with the name of a volume
is complete, and is never formatted again.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import trio

from volant.host import PROGRAM_ENVIRONMENT, Host, inside
from volant.model import Problem, Volume
from volant.store import fresh, is_fresh

_MKFS = "mke2fs"
_OPTIONS = (
    *("-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"),
    *("-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"),
)
"""Options of mke2fs. A small volume has the block size of a large one, as it may grow. No blocks are reserved for root:
a full volume stops no guest. Lazy tables need not be written to a file of holes."""
_MKFS_S = 120.0
_COPY_S = 3600.0
_MAGIC_AT, _MAGIC = 1024 + 0x38, b"\x53\xef"
_INCOMPAT_AT, _RECOVER = 1024 + 0x60, 0x4
"""The offset of ext4's features that a kernel must know to mount it, and the flag for a journal that needs a replay."""
_RESERVE_MB = 128
"""Space reserved on the disk for the database and the logs."""


def volume_path(directory: Path, volume_id: str) -> Path:
    """Returns the file of a volume, whether or not it exists."""
    return inside(directory, f"{volume_id}.img")


async def needs_replay(host: Host, path: Path) -> bool:
    """Returns whether the journal of a volume needs a replay because its writer was killed, which only a writable mount
    can do. Reads only one bit of the content, which is a guest's. :raises OSError: the disk fails."""
    head = await host.files.read(path, _INCOMPAT_AT + 4)
    is_ext4 = head[_MAGIC_AT : _MAGIC_AT + 2] == _MAGIC
    return is_ext4 and bool(int.from_bytes(head[_INCOMPAT_AT : _INCOMPAT_AT + 4], "little") & _RECOVER)


class VolumeFiles(msgspec.Struct, frozen=True):
    """The files of one daemon's volumes."""

    host: Host
    directory: Path

    def path(self, volume: Volume) -> Path:
        """Returns the file of a volume."""
        return volume_path(self.directory, volume.id)

    def used(self, volume: Volume) -> int | None:
        """Returns the bytes that a volume takes up on the disk; None if its file is missing. For worker threads."""
        path = self.path(volume)
        return self.host.disk.used(path) if self.host.files.exists(path) else None

    async def make(self, volume: Volume) -> None:
        """Creates an empty volume, which is completely on the disk when this returns.

        :raises Problem: 503, `mke2fs` is missing or fails. :raises OSError: the disk fails, or is full.
        """
        unfinished = await self._fresh(volume)
        await self.host.disk.allocate(unfinished, volume.size_mb * 2**20, reserve=False)
        try:
            status, output = await self.host.processes.run(
                [_MKFS, *_OPTIONS, str(unfinished)], env=PROGRAM_ENVIRONMENT, cwd=self.directory, timeout_s=_MKFS_S
            )
        except trio.TooSlowError:
            raise _failed(volume, f"mke2fs did not format it within {_MKFS_S:g} s") from None
        except FileNotFoundError as error:
            if error.filename != _MKFS:
                raise
            raise _failed(volume, "mke2fs is not installed (Debian: apt install e2fsprogs)") from None
        if status != 0:
            raise _failed(volume, f"mke2fs failed: {output.decode('utf-8', 'replace').strip()[-500:]}")
        await self.host.files.put_in_place(unfinished, self.path(volume))

    async def copy(self, volume: Volume, source: Path) -> None:
        """Creates a volume as a copy of a file without a writer.

        :raises Problem: 503, it takes too long. :raises OSError: the disk fails, or is full.
        """
        unfinished = await self._fresh(volume)
        with trio.move_on_after(_COPY_S) as scope:
            await self.host.files.copy(source, unfinished)
            await self.host.files.put_in_place(unfinished, self.path(volume))
        if scope.cancelled_caught:
            raise _failed(volume, f"the copy was not made within {_COPY_S:g} s")

    async def grow(self, volume: Volume) -> None:
        """Extends the file to the size of the volume; never shortens it. :raises OSError: the disk fails."""
        if self.host.files.size(self.path(volume)) < volume.size_mb * 2**20:
            await self.host.disk.extend(self.path(volume), volume.size_mb * 2**20)

    async def remove(self, volume_id: str) -> None:
        """Removes all files of a volume. :raises OSError: the disk fails."""
        path = volume_path(self.directory, volume_id)
        await self.host.files.remove(fresh(path))
        await self.host.files.remove(path)

    async def remove_unfinished(self) -> None:
        """Removes files that a killed daemon has not finished. :raises OSError: the disk fails."""
        if self.host.files.exists(self.directory):
            for name in self.host.files.names(self.directory):
                if is_fresh(name):
                    await self.host.files.remove(self.directory / name)

    def check_room(self, needed_mb: int) -> None:
        """Checks the free space. :raises Problem: 503, the host's disk does not have this much."""
        directory = self.directory if self.host.files.exists(self.directory) else self.directory.parent
        try:
            free_mb = self.host.disk.free(directory) // 2**20
        except OSError as error:
            raise Problem(503, "no-capacity", f"{directory} can't be read: {error.strerror}") from error
        if needed_mb + _RESERVE_MB > free_mb:
            raise Problem(
                503, "no-capacity",
                f"the volume may take {needed_mb} MiB more, and {free_mb} MiB are left in {directory}, of which "
                f"{_RESERVE_MB} are the daemon's own",
                hint="delete a volume, a VM or a snapshot, make room, or ask for less size_mb",
            )  # fmt: skip

    async def _fresh(self, volume: Volume) -> Path:
        """Returns the path of the unfinished file, after removing an old one. :raises OSError:"""
        await self.host.files.mkdir(self.directory)
        unfinished = fresh(self.path(volume))
        await self.host.files.remove(unfinished)
        return unfinished


def _failed(volume: Volume, why: str) -> Problem:
    return Problem(503, "volume-failed", f"volume {volume.name!r} is not made: {why}")
