"""All VM logs of this daemon."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

import trio

from volant.host import Host

from ._segments import Segment, segment_of
from ._throttle import log_share
from ._vmlog import LogStatistics, VmLog

_SWEEP_S = 600.0
_IDLE_S = 600.0
_MARKER = ".deleted"


class VmLogs:
    """The logs of all VMs, one directory full of segments. It outlives every incarnation of an actor.

    `await prepare()` comes first. `keep` is a supervisor's child: it removes what retention lets go of, and the logs
    of deleted VMs once their time has come.
    """

    def __init__(
        self,
        host: Host,
        directory: Path,
        *,
        max_bytes: int = 64 * 1024 * 1024,
        max_age_s: float = 7 * 86400.0,
        segment_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        """`max_bytes` and `max_age_s` bound the log of one VM; lines go by whole segments."""
        if max_bytes < 2 * segment_bytes:
            raise ValueError("a log needs room for two segments")
        self._host = host
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._segment_bytes = segment_bytes
        self._prepared = False
        self._found: dict[int, list[Segment]] = {}
        """Of logs that nobody has opened yet."""
        self._logs: dict[int, VmLog] = {}
        self._expiry: dict[int, datetime] = {}
        self._dropped: dict[Path, None] = {}
        self._share = log_share()
        self._wake = trio.Event()

    async def prepare(self) -> None:
        """Find out what logs there are. :raises OSError: the directory can't be made or read."""
        if not self._prepared:
            await self._host.files.mkdir(self._directory)
            await self._host.threads.run(self._scan)
            self._prepared = True

    def _scan(self) -> None:
        for name in self._host.files.names(self._directory):
            path = self._directory / name
            found = segment_of(self._host, path)
            if found is not None:
                self._found.setdefault(found[0], []).append(found[1])
            elif name.endswith(_MARKER) and name.removesuffix(_MARKER).isdigit():
                vm_id = int(name.removesuffix(_MARKER))
                fd = self._host.descriptors.open(path, 0)
                try:
                    text = self._host.descriptors.read_at(fd, 64, 0).decode("ascii", "replace")
                finally:
                    self._host.descriptors.close(fd)
                try:
                    self._expiry[vm_id] = datetime.fromisoformat(text)
                except ValueError:
                    self._expiry[vm_id] = self._host.clock.now() + timedelta(days=1)

    def open(self, vm_id: int, name: str) -> VmLog:
        """The log of a VM that is there, for its pump and for readers; always the same object.

        Reads the end of the log in place when it is opened first: that is short.

        :raises OSError: the log can't be read.
        :raises RuntimeError: `prepare` was not called.
        """
        if not self._prepared:
            raise RuntimeError("VmLogs.prepare() comes first")
        log = self._log(vm_id)
        log.set_name(name)
        return log

    def find(self, vm_id: int) -> VmLog | None:
        """The log of a VM that is there or that was deleted less than its time ago. None when there is none.

        :raises OSError: the log can't be read.
        """
        if vm_id in self._logs or vm_id in self._found:
            return self._log(vm_id)
        return None

    async def forget(self, vm_id: int, keep_s: float = 86400.0) -> None:
        """The VM is deleted: its log ends now, and goes after `keep_s`. May be called again; the first time counts.

        :raises OSError: the disk does not take the mark of it.
        """
        if vm_id not in self._expiry and self.find(vm_id) is not None:
            expiry = self._host.clock.now() + timedelta(seconds=keep_s)
            self._expiry[vm_id] = expiry
            self._log(vm_id).end()
            try:
                await self._host.files.write(self._marker(vm_id), expiry.isoformat().encode())
            except BaseException:
                del self._expiry[vm_id]
                raise
            if keep_s <= 0:
                self._wake.set()

    async def forget_unknown(self, vm_ids: Collection[int]) -> None:
        """Forget the logs of all VMs but these: those that were deleted when the daemon died half-way.

        :raises OSError: see `forget`.
        """
        for vm_id in {*self._logs, *self._found}.difference(vm_ids):
            await self.forget(vm_id)

    async def recall(self, vm_ids: Collection[int]) -> None:
        """These VMs are there: what was forgotten of them, before the database was put back, is kept again.

        :raises OSError: the mark of it can't be removed.
        """
        for vm_id in self._expiry.keys() & set(vm_ids):
            await self._host.files.remove(self._marker(vm_id))
            self._expiry.pop(vm_id, None)
            if vm_id in self._logs:
                self._logs[vm_id].go_on()

    def sizes(self) -> dict[int, tuple[int, bool]]:
        """Bytes of each VM's log, and whether that VM is deleted."""
        logs = {vm_id: log.statistics().bytes for vm_id, log in self._logs.items()}
        found = {vm_id: sum(segment.size for segment in segments) for vm_id, segments in self._found.items()}
        return {vm_id: (size, vm_id in self._expiry) for vm_id, size in {**found, **logs}.items()}

    async def discard(self, vm_id: int) -> bool:
        """Remove the log of a deleted VM before its time; whether there was one. :raises OSError: it can't be."""
        if vm_id not in self._expiry:
            return False
        await self._remove(vm_id)
        return True

    def ids(self) -> set[int]:
        """Of all VMs of which there is a log."""
        return {*self._logs, *self._found}

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remove what is past its time, for ever. :raises OSError: files can't be removed."""
        await self.prepare()
        task_status.started()
        while True:
            await self.sweep()
            with trio.move_on_after(_SWEEP_S):
                await self._wake.wait()

    async def sweep(self) -> None:
        """Remove what is past its time now. :raises OSError: files can't be removed."""
        self._wake = trio.Event()
        now = self._host.clock.now()
        cutoff_us = _us(now - timedelta(seconds=self._max_age_s))
        idle_us = _us(now - timedelta(seconds=_IDLE_S))
        for vm_id in [*self._logs, *self._found]:
            if self._expiry.get(vm_id, now + timedelta(days=1)) <= now:
                await self._remove(vm_id)
            elif vm_id in self._logs or self._found[vm_id][0].at_us < cutoff_us:
                self._log(vm_id).expire(cutoff_us, idle_us)
                await trio.lowlevel.checkpoint()
        for vm_id in [vm_id for vm_id in self._expiry if vm_id not in self._logs and vm_id not in self._found]:
            await self._remove(vm_id)
        await self._remove_dropped()

    async def _remove(self, vm_id: int) -> None:
        if self.find(vm_id) is not None:
            self._log(vm_id).remove()
            del self._logs[vm_id]
        # The mark goes last: what is left over by a crash before that is found again by it.
        await self._remove_dropped()
        await self._host.files.remove_tree(self._marker(vm_id))
        self._expiry.pop(vm_id, None)

    async def _remove_dropped(self) -> None:
        while self._dropped:
            path = next(iter(self._dropped))
            await self._host.files.remove_tree(path)
            self._dropped.pop(path, None)

    def statistics(self) -> dict[int, LogStatistics]:
        """Figures of the logs that somebody has opened, by the VM's id."""
        return {vm_id: log.statistics() for vm_id, log in self._logs.items()}

    def close(self) -> None:
        """The daemon stops: close the files. Logs can be opened again after it."""
        for log in self._logs.values():
            log.release()

    def _log(self, vm_id: int) -> VmLog:
        log = self._logs.get(vm_id)
        if log is None:
            log = VmLog(
                self._host,
                self._directory,
                vm_id,
                self._found.get(vm_id, []),
                max_bytes=self._max_bytes,
                segment_bytes=self._segment_bytes,
                drop=self._drop,
                share=self._share,
            )
            if vm_id in self._expiry:
                log.end()
            self._logs[vm_id] = log
            self._found.pop(vm_id, None)
        return log

    def _drop(self, path: Path) -> None:
        self._dropped[path] = None
        self._wake.set()

    def _marker(self, vm_id: int) -> Path:
        return self._directory / f"{vm_id}{_MARKER}"


def _us(when: datetime) -> int:
    return int(when.timestamp() * 1_000_000)
