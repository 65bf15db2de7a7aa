"""Creates, copies, grows and removes volumes.

The row of a volume is created before its file and removed after it. The next daemon removes the unfinished work of a
killed one, or grows a file to the size in the row.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from actors import Ref, Request
from volant.concurrency import Backoff
from volant.host import Host
from volant.journal import (
    AbandonVolume,
    BeginRemovalOfVolume,
    BeginVolume,
    DuplicateRequest,
    FinishVolume,
    ForgetVolume,
    IdempotencyKey,
    Journal,
    Names,
    ResizeRow,
    Store,
    ask_journal,
)
from volant.model import (
    CloneVolume,
    CreateVolume,
    Key,
    Problem,
    ResizeVolume,
    VmRow,
    Volume,
    VolumeView,
    no_such_volume,
    volume_view,
    writer_of,
)

from ._files import VolumeFiles

R = TypeVar("R")
_MOST_JOBS = 16
"""Maximum number of volumes that are created, copied, grown or removed at a time."""
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0
_ID_DIGITS = 16
"""The length that fits into a disk's serial number."""
_logger = logging.getLogger("volant.volumes")


class Volumes(msgspec.Struct):
    """The volumes of one daemon. Changes run in separate tasks, so that they continue when the caller is cancelled."""

    host: Host
    store: Store
    journal: Ref[Journal]
    files: VolumeFiles
    names: Names
    grow_guest: Callable[[Volume], Awaitable[None]]
    """Makes the guest that writes to a volume use its new size, if there is one. Raises Problem 503 if it can't."""
    _nursery: trio.Nursery | None = None
    _jobs: int = 0
    _removals: set[str] = msgspec.field(default_factory=set)
    """The ids of volumes that are being removed in the background."""

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the changes until cancelled, and completes the unfinished work of an earlier daemon. :raises OSError:"""
        await self.files.remove_unfinished()
        async with trio.open_nursery() as nursery:
            for volume in tuple(self.store.projection.volumes.values()):
                if volume.status == "ready":
                    await self._repair_size(volume)
                else:
                    _logger.warning("volume %s was being %s, and is removed", volume.name, _DOING[volume.status])
                    self._removals.add(volume.id)
                    nursery.start_soon(self._remove, volume.key, volume.id)
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # Requests

    async def views(self, project: str | None) -> list[VolumeView]:
        """Returns the volumes of a project, by name; None for all projects."""
        volumes = sorted(self.store.projection.volumes.items())
        return await self._views([volume for key, volume in volumes if project in (None, key.project)])

    async def view(self, key: Key) -> VolumeView:
        """Returns a volume. :raises Problem: 404."""
        [view] = await self._views([self._find(key)])
        return view

    async def create(self, request: CreateVolume, project: str, *, key: IdempotencyKey | None = None) -> Volume:
        """Creates an empty volume, which is completely on the disk when this returns.

        :raises Problem: 400, the request is invalid; 409, the name is taken; 503, it can't be created.
        :raises DuplicateRequest: the request was answered before.
        """
        self.files.check_room(request.size_mb)
        return await self._run(partial(self._make, request, project, None, key))

    async def clone(self, volume: Key, request: CloneVolume, *, key: IdempotencyKey | None = None) -> Volume:
        """Copies a volume that no VM writes to. The copy is completely on the disk when this returns.

        :raises Problem: 400; 404; 409, a VM writes to it, or the name is taken; 503, it can't be created.
        :raises DuplicateRequest: the request was answered before.
        """
        source = self._find(volume)
        used = await self.host.threads.run(self.files.used, source)
        if used is None:
            raise _missing(source)
        self.files.check_room(used // 2**20)
        return await self._run(partial(self._make, request, source.project, source, key))

    async def begin_copy(self, copy: Key, source: Path) -> Volume:
        """Creates a volume with the content of a file, which stays `creating`: a commit of the caller makes it `ready`,
        or `abandon` or the next start removes it.

        :raises Problem: 409, the name is taken; 503, it can't be created.
        """
        try:
            size = await self.host.threads.run(self.host.files.size, source)
            used = await self.host.threads.run(self.host.disk.used, source)
        except OSError as error:
            raise _problem(f"volume {copy.name!r} is not made: {source.name} can't be read", error) from error
        self.files.check_room(used // 2**20)
        wanted, made = True, []

        async def make() -> Volume:
            volume = await self._begin_copy(CreateVolume(name=copy.name, size_mb=size // 2**20), copy.project, source)
            made.append(volume)
            if not wanted:
                self.abandon(volume)
            return volume

        try:
            return await self._run(make)
        except trio.Cancelled:
            wanted = False
            for volume in made:
                self.abandon(volume)
            raise

    def abandon(self, volume: Volume) -> None:
        """Removes a volume in the background, unless it has become `ready`."""
        self._remove_later(volume.key, volume.id)

    async def resize(self, volume: Key, request: ResizeVolume, *, key: IdempotencyKey | None = None) -> Volume:
        """Grows a volume, and the filesystem of the guest that writes to it, if there is one.

        :raises Problem: 404; 409, it would shrink; 503, it can't grow now, or its guest can't.
        :raises DuplicateRequest: the request was answered before.
        """
        found = self._find(volume)
        self.files.check_room(max(0, request.size_mb - found.size_mb))
        return await self._run(partial(self._grow, found, request.size_mb, key))

    async def delete(self, key: Key) -> None:
        """Removes a volume that no VM refers to. :raises Problem: 404; 409, a VM refers to it; 503, it can't be removed
        now."""
        await self._run(partial(self._delete, key))

    # Changes

    async def _make(
        self, request: CreateVolume | CloneVolume, project: str, source: Volume | None, key: IdempotencyKey | None
    ) -> Volume:
        volume = await self._begin(request, project, None if source is None else source.name)
        try:
            if source is None:
                await self.files.make(volume)
            else:
                await self.files.copy(volume, self.files.path(source))
            return await self._ask(FinishVolume(volume.key, volume.id, key))
        except (DuplicateRequest, OSError, Problem) as error:
            _logger.warning("volume %s is not made: %s", volume.name, error)
            self.abandon(volume)
            raise _problem(f"volume {volume.name!r} is not made", error) from error

    async def _begin(self, request: CreateVolume | CloneVolume, project: str, source: str | None = None) -> Volume:
        self._check_not_left(Key(project, request.name))
        volume_id = self.host.random.new_id()[:_ID_DIGITS]
        try:
            async with self.names.claimed([Key(project, request.name)]):
                return await self._ask(BeginVolume(request, project, volume_id, source))
        except Problem as problem:
            self._remove_later(Key(project, request.name), volume_id, problem)
            raise

    async def _begin_copy(self, request: CreateVolume, project: str, source: Path) -> Volume:
        volume = await self._begin(request, project)
        try:
            await self.files.copy(volume, source)
        except (OSError, Problem) as error:
            self.abandon(volume)
            raise _problem(f"volume {volume.name!r} is not made", error) from error
        return volume

    async def _grow(self, volume: Volume, size_mb: int, key: IdempotencyKey | None) -> Volume:
        after = await self._ask(ResizeRow(volume.key, volume.id, size_mb))
        try:
            await self.files.grow(after)
        except OSError as error:
            raise _problem(f"the file of volume {volume.name!r} can't grow yet", error) from error
        await self.grow_guest(after)
        if key is None:
            return after
        # Its answer is stored only now: a request that is repeated after a kill does what is missing.
        return await self._ask(ResizeRow(volume.key, volume.id, size_mb, key))

    async def _delete(self, key: Key) -> None:
        volume = self._find(key)
        if volume.status == "creating":
            self._check_not_left(key)
        try:
            volume = await self._ask(BeginRemovalOfVolume(key))
            await self.files.remove(volume.id)
            await self._ask(ForgetVolume(volume.key, volume.id))
            await self.names.free(key)
        except OSError as error:
            self._remove_later(volume.key, volume.id)
            raise _problem(f"the file of volume {key.name!r} can't be removed yet", error) from error
        except Problem as problem:
            self._remove_later(volume.key, volume.id, problem)
            raise

    def _remove_later(self, key: Key, volume_id: str, problem: Problem | None = None) -> None:
        """Removes a volume in the background; if the daemon stops, the next one does. `problem` is the journal's
        answer; only after a 503 is it unknown whether the journal made the change."""
        open_question = problem is None or problem.status == 503
        if open_question and self._nursery is not None and volume_id not in self._removals:
            self._removals.add(volume_id)
            self._nursery.start_soon(self._remove, key, volume_id)

    def _check_not_left(self, key: Key) -> None:
        """Checks that no unfinished volume has this name. :raises Problem: 503, one was not finished or removed, and
        will be removed soon. A 409 would be stored for the key of a request that is repeated after a kill, though there
        is no such volume."""
        left = self.store.projection.volumes.get(key)
        if left is not None and left.id in self._removals:
            what = f"the remains of an earlier volume {key.name!r} are being removed"
            raise Problem(503, "volumes-busy", what, hint="try again in a moment")

    async def _remove(self, key: Key, volume_id: str) -> None:
        """Removes a volume that was not finished, or not removed; retries while the disk or the journal fails.

        A volume that is ready in the journal is kept, even if that was not confirmed.
        """
        try:
            await self._retry_removal(key, volume_id)
        finally:
            self._removals.discard(volume_id)

    async def _retry_removal(self, key: Key, volume_id: str) -> None:
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            try:
                after = await self._ask(AbandonVolume(key, volume_id))
                if after is None or after.status == "ready":
                    return
                await self.files.remove(volume_id)
                await self._ask(ForgetVolume(key, volume_id))
                await self.names.free(key)
                return
            except (OSError, Problem) as error:
                _logger.warning("the remains of volume %s are not removed yet: %s", key.name, error)
            await backoff.pause()

    async def _repair_size(self, volume: Volume) -> None:
        """Grows the file to the size in the row. A row from a backup may have a smaller size than the file."""
        try:
            size_mb = self.host.files.size(self.files.path(volume)) // 2**20
            if size_mb > volume.size_mb:
                await self._ask(ResizeRow(volume.key, volume.id, size_mb))
            else:
                await self.files.grow(volume)
        except FileNotFoundError:
            _logger.error("the file of volume %s, %s, is gone", volume.name, self.files.path(volume))
        except (OSError, Problem) as error:
            _logger.warning("the size of volume %s can't be repaired: %s", volume.name, error)

    # Tasks

    async def _run(self, change: Callable[[], Awaitable[R]]) -> R:
        """Returns the result of a change, which continues when the caller is cancelled. Raises its errors."""
        if self._nursery is None or self._jobs >= _MOST_JOBS:
            what = "can't be changed at present" if self._nursery is None else f"{self._jobs} are being changed"
            raise Problem(503, "volumes-busy", f"volumes: {what}", hint="try again in a moment")
        done, results, failures = trio.Event(), [], []
        self._jobs += 1

        async def run() -> None:
            try:
                results.append(await change())
            except (DuplicateRequest, Problem) as error:
                failures.append(error)
            finally:
                self._jobs -= 1
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if failures:
            raise failures[0]
        if not results:
            raise Problem(503, "daemon-stopping", "the daemon stops", hint="look at the volume once it is back")
        return results[0]

    async def _ask(self, message: Request[R]) -> R:
        return await ask_journal(self.journal, message)

    def _find(self, key: Key) -> Volume:
        volume = self.store.projection.volumes.get(key)
        if volume is None:
            raise no_such_volume(key.name)
        return volume

    async def _views(self, volumes: Sequence[Volume]) -> list[VolumeView]:
        used = await self.host.threads.run(lambda: [self.files.used(volume) for volume in volumes])
        users: dict[str, list[VmRow]] = {}
        for row in self.store.projection.rows():
            for mount in row.volumes:
                users.setdefault(mount.id, []).append(row)
        views = []
        for volume, used_bytes in zip(volumes, used, strict=True):
            rows = users.get(volume.id, ())
            writer = writer_of(volume.id, rows)
            views.append(
                volume_view(
                    volume,
                    used_bytes=used_bytes,
                    used_by=[row.name for row in rows],
                    writer=None if writer is None else writer.name,
                )
            )
        return views


_DOING = {"creating": "made", "deleting": "deleted"}


def _problem(what: str, error: Exception) -> Exception:
    if isinstance(error, OSError):
        return Problem(503, "volume-failed", f"{what}: {error.strerror or error}", hint="make room, and try again")
    return error


def _missing(volume: Volume) -> Problem:
    return Problem(
        409, "volume-missing", f"the file of volume {volume.name!r} is gone", hint="put it back, or delete it"
    )
