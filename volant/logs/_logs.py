"""The logs of all VMs, and their retention."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

import trio

from volant.host import Host
from volant.model import Key

from ._log import LogStatistics, VmLog
from ._segments import Segment, segment_of
from ._throttle import log_share

_SWEEP_S = 600.0
_IDLE_S = 600.0
_MARKER = ".deleted"


class VmLogs:
    """Holds the logs of all VMs, in one directory. It survives restarts of actors.

    `await prepare()` comes first. `keep` is a child of a supervisor: it removes expired lines, and expired logs of
    deleted VMs.
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
        """`max_bytes` and `max_age_s` limit the log of one VM. Whole segments are removed."""
        if max_bytes < 2 * segment_bytes:
            raise ValueError("a log needs room for two segments")
        self._host = host
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._segment_bytes = segment_bytes
        self._prepared = False
        self._found: dict[int, list[Segment]] = {}
        """The segments of logs that are not open yet."""
        self._logs: dict[int, VmLog] = {}
        self._expiry: dict[int, datetime] = {}
        self._dropped: dict[Path, None] = {}
        self._share = log_share()
        self._reading = trio.Lock()
        self._wake = trio.Event()

    async def prepare(self) -> None:
        """Finds the logs on the disk. :raises OSError: the directory can't be created or read."""
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

    def open(self, vm_id: int, vm: Key) -> VmLog:
        """Returns the log of a VM that exists, always the same object.

        The first call reads the end of the log, which is short.

        :raises OSError: the log can't be read.
        :raises RuntimeError: `prepare` was not called.
        """
        if not self._prepared:
            raise RuntimeError("VmLogs.prepare() comes first")
        log = self._log(vm_id)
        log.set_key(vm)
        return log

    def find(self, vm_id: int) -> VmLog | None:
        """Returns the log of a VM, also of a deleted one that has not expired.

        :raises OSError: the log can't be read.
        """
        if vm_id in self._logs or vm_id in self._found:
            return self._log(vm_id)
        return None

    async def forget(self, vm_id: int, keep_s: float = 86400.0) -> None:
        """Ends the log of a deleted VM, which expires after `keep_s`. Only the first call has an effect. :raises
        OSError: the disk fails."""
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
        """Ends the logs of all other VMs: a daemon may have been killed during a delete. :raises OSError: see
        `forget`."""
        for vm_id in {*self._logs, *self._found}.difference(vm_ids):
            await self.forget(vm_id)

    async def recall(self, vm_ids: Collection[int]) -> None:
        """Keeps the logs of these VMs, which a restored database has again.

        :raises OSError: the disk fails.
        """
        for vm_id in self._expiry.keys() & set(vm_ids):
            await self._host.files.remove(self._marker(vm_id))
            self._expiry.pop(vm_id, None)
            if vm_id in self._logs:
                self._logs[vm_id].go_on()

    def sizes(self) -> dict[int, tuple[int, bool]]:
        """Returns the bytes of each VM's log, and whether that VM is deleted."""
        logs = {vm_id: log.statistics().bytes for vm_id, log in self._logs.items()}
        found = {vm_id: sum(segment.size for segment in segments) for vm_id, segments in self._found.items()}
        return {vm_id: (size, vm_id in self._expiry) for vm_id, size in {**found, **logs}.items()}

    async def discard_project(self, project: str) -> None:
        """Removes the logs of a project's deleted VMs. :raises OSError: the disk fails."""
        for vm_id in list(self._expiry):
            log = self.find(vm_id)
            if log is not None and log.key.project == project:
                await self.discard(vm_id)

    async def discard(self, vm_id: int) -> bool:
        """Removes the log of a deleted VM now. Returns whether there was one. :raises OSError: the disk fails."""
        if vm_id not in self._expiry:
            return False
        await self._remove(vm_id)
        return True

    def ids(self) -> set[int]:
        """Returns the ids of all VMs with a log."""
        return {*self._logs, *self._found}

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Removes expired lines and logs at intervals, until cancelled. :raises OSError: files can't be removed."""
        await self.prepare()
        task_status.started()
        while True:
            await self.sweep()
            with trio.move_on_after(_SWEEP_S):
                await self._wake.wait()

    async def sweep(self) -> None:
        """Removes expired lines and logs. :raises OSError: files can't be removed."""
        self._wake = trio.Event()
        now = self._host.clock.now()
        cutoff_us = _us(now - timedelta(seconds=self._max_age_s))
        idle_us = _us(now - timedelta(seconds=_IDLE_S))
        for vm_id in [*self._logs, *self._found]:
            if self._expiry.get(vm_id, now + timedelta(days=1)) <= now:
                await self._remove(vm_id)
            elif vm_id in self._logs or self._is_due(vm_id, cutoff_us):
                self._log(vm_id).expire(cutoff_us, idle_us)
                await trio.lowlevel.checkpoint()
        for vm_id in [vm_id for vm_id in self._expiry if vm_id not in self._logs and vm_id not in self._found]:
            await self._remove(vm_id)
        await self._remove_dropped()

    def _is_due(self, vm_id: int, cutoff_us: int) -> bool:
        """Returns whether a log that is not open yet has expired lines."""
        # `discard` may have removed the log while the sweep waited for the disk.
        segments = self._found.get(vm_id)
        return segments is not None and segments[0].at_us < cutoff_us

    async def _remove(self, vm_id: int) -> None:
        if self.find(vm_id) is not None:
            self._log(vm_id).remove()
            del self._logs[vm_id]
        # The marker goes last: after a crash the rest is found by it.
        await self._remove_dropped()
        await self._host.files.remove_tree(self._marker(vm_id))
        self._expiry.pop(vm_id, None)

    async def _remove_dropped(self) -> None:
        while self._dropped:
            path = next(iter(self._dropped))
            await self._host.files.remove_tree(path)
            self._dropped.pop(path, None)

    def statistics(self) -> dict[int, LogStatistics]:
        """Returns the statistics of the open logs, by the VM's id."""
        return {vm_id: log.statistics() for vm_id, log in self._logs.items()}

    def close(self) -> None:
        """Closes the files. Logs can be opened again."""
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
                reading=self._reading,
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
