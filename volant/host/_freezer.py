"""`Freezer`: the control group of the movable VMs, which other hosts may start. It is frozen as a whole.

The daemon freezes it when its host may not run them any more. If the daemon can't, a second process does so, the
watchdog (`_watchdog.py`). Only the daemon thaws it. `docs/explanation/fleet.md` has the reasons.

`volant-INSTANCE-movable` has two groups: `watchdog` with the watchdog, and `vms`, which is frozen, with a group for
each process. With systemd it is a scope that systemd has delegated to the daemon; otherwise the daemon creates it next
to its other groups. It is kept while the host is in a fleet, even without a daemon. The shared memory is a file whose
name contains the id of the boot, as the clock restarts with each.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import stat
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import trio

from volant.concurrency import Backoff
from volant.model import ProcessIdentity

from . import _cgroups, _priorities, _watchdog
from ._cgroups import Cgroups, ResourceLimits
from ._directories import make_own_directory
from ._host import Host
from ._procfs import ProcessGone
from ._programs import PROGRAM_ENVIRONMENT
from ._scopes import ScopeError, Scopes
from ._watchdog import Deadline, boottime

_logger = logging.getLogger("volant.host")

_WATCHDOG = "watchdog"
"""The name of the watchdog's group."""
_FREEZE = "cgroup.freeze"
_SHARED = "run-until-"
_LOG = "watchdog.log"
_OPEN_S = 20.0
"""Maximum time for the start of the watchdog, and systemd's answer."""
_FREEZE_S = 5.0
"""Maximum time for freezing. The kernel takes some milliseconds, unless a process waits for a disk or a network file
system that does not answer. Such a process does not run either."""
_LOOK_AGAIN_S = 2.0
_WEIGH_S = 30.0
_WEIGHT, _MOST_WEIGHT = 100, 10_000
"""The default and the maximum CPU weight of a group."""
_START_TRIES = 5
_END_S = 5.0
_FIRST_S = 60
"""Maximum lifetime of a scope's first process, in case the daemon is killed."""
_AGAIN_S = 0.02
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STEADY_S = 0.1, 10.0, 60.0


class FreezerFailed(Exception):
    """VMs can't be frozen on this host, or freezing one failed. The text is for people."""


def watchdog_tag(instance: str) -> str:
    """Returns the process tag of the watchdog, which no VM has."""
    return f"volant-{instance}-watchdog"


class Freezer:
    """The control group of the movable VMs, which is frozen as a whole, and its watchdog."""

    def __init__(self, host: Host, directory: Path, *, instance: str, scopes: Scopes | None) -> None:
        """Creates it. `directory` is only for the shared memory; for `scopes` see `host`."""
        self._host = host
        self._directory = directory
        self._name = f"volant-{instance}{_cgroups.MOVABLE}"
        self._tag = watchdog_tag(instance)
        self._scopes = scopes
        self._deadline: Deadline | None = None
        self._watchdog: ProcessIdentity | None = None
        self._group: Path | None = None
        self._is_thawed = False
        self._weight = 0
        self._is_open = False
        self._changes = trio.Lock()

    @property
    def watched(self) -> bool:
        """Whether there is a watchdog."""
        return self._watchdog is not None

    async def open(self) -> None:
        """Creates the group and starts the watchdog, or finds those of the last daemon. A new group is frozen until
        `last` and `thaw`.

        :raises FreezerFailed: it is not possible on this host, with the reason.
        """
        try:
            async with self._changes:
                self._deadline = await trio.to_thread.run_sync(self._open_shared)
                if self._deadline.get() == math.inf:
                    # The host had left the fleet.
                    self._deadline.set(0)
                await self._establish()
                self._is_thawed, self._is_open = not self.is_frozen, True
        except OSError as error:
            hint = ""
            if self._scopes is not None and error.errno == errno.EROFS:
                hint = "; run `volar setup`, as the service may not write there"
            raise FreezerFailed(f"VMs can't be frozen on this host: {error}{hint}") from error

    @property
    def until(self) -> float:
        """The time until which the VMs may run, by CLOCK_BOOTTIME; 0 if they may not."""
        return 0.0 if self._deadline is None else self._deadline.get()

    def last(self, until: float) -> None:
        """Lets the VMs run until this time; the watchdog freezes them afterwards. Thaws nothing. Ignored after
        `close`."""
        if self._is_open and self._deadline is not None:
            self._deadline.set(until)

    @property
    def is_frozen(self) -> bool:
        """Whether all VMs are frozen."""
        return self._group is not None and _cgroups.is_frozen(self._group)

    async def enclose(self, identity: ProcessIdentity, description: str, limits: ResourceLimits | None) -> None:
        """Moves a process into a separate group below the frozen one; an existing one is kept. `Limits.apply`, before
        or after it, leaves the process there and only applies the rest.

        :raises FreezerFailed: the process must not run.
        """
        self._vms()
        try:
            await self._host.limits.enclose(identity, limits)
        except (OSError, ProcessGone) as error:
            raise FreezerFailed(f"{description}: process {identity.pid} can't be frozen: {error}") from error
        await self._weigh()

    async def freeze(self) -> None:
        """Freezes all VMs, and waits until they are. :raises FreezerFailed: some are not after 5 s."""
        self._is_thawed = False
        await self._write("1")

    async def thaw(self, tags: Collection[str] | None = None) -> None:
        """Thaws all VMs, or only those with these process tags.

        :raises FreezerFailed: their time is over, or they are not thawed within 5 s.
        """
        if boottime() >= self.until:
            raise FreezerFailed("the VMs stay frozen, as their time is over")
        try:
            for group in self._vms().iterdir():
                if tags is not None and group.is_dir():
                    (group / _FREEZE).write_text("0" if group.name in tags else "1")
        except FileNotFoundError:
            raise FreezerFailed("a VM has ended just now") from None
        except OSError as error:
            raise FreezerFailed(f"a VM can't be kept frozen: {error}") from error
        self._is_thawed = True
        await self._write("0")

    async def stopped(self) -> None:
        """Waits until the VMs are frozen by the watchdog or an operator, after a call of `thaw`.

        The caller must ask etcd before it thaws them again. The watchdog may also have been late: it read an expired
        time, and froze them after `thaw`.
        """
        while not (self._is_thawed and self.is_frozen):
            # Not without end, as the group may be made anew.
            with trio.move_on_after(_LOOK_AGAIN_S):
                await self._changed()

    async def _changed(self) -> None:
        """Waits until the kernel reports a change of the group."""
        if self._group is not None:
            with suppress(OSError), self._host.watches.open(self._group / "cgroup.events") as watch:
                while not (self._is_thawed and self.is_frozen):
                    await watch.wait()
                return
        await trio.sleep_forever()

    async def keep(self) -> None:
        """Keeps a watchdog running until cancelled: starts another one when it ends, unless `close` was called. Logs
        failures."""
        backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, steady_s=_STEADY_S)
        while True:
            if self._watchdog is not None:
                await self._ended(self._watchdog)
                self._watchdog = None
            if not self._is_open:
                await trio.sleep(_LOOK_AGAIN_S)
                continue
            _logger.error("there is no watchdog of VMs that may move; it is started")
            await backoff.pause()
            try:
                async with self._changes:
                    if self._is_open:
                        await self._establish()
            except (FreezerFailed, OSError) as error:
                _logger.error("nothing freezes VMs that may move if this daemon dies: %s", error)

    async def _ended(self, watchdog: ProcessIdentity) -> None:
        """Waits until the watchdog has ended."""
        with suppress(ProcessGone), self._host.processes.open(watchdog) as process:
            while not process.exited:
                await self._weigh()
                with trio.move_on_after(_WEIGH_S):
                    status = await process.wait()
                    if self._is_open:
                        how = "" if status is None else f" with status {status}"
                        _logger.error("the watchdog of VMs that may move has ended%s", how)

    async def close(self) -> None:
        """Lets all VMs run forever, as the host has left the fleet, and removes the group and the watchdog if the group
        is empty. Otherwise another call removes them. Works without `open`, so that a daemon without a fleet can remove
        the remains of one in a fleet.

        :raises FreezerFailed:
        """
        try:
            async with self._changes:
                self._is_open = False
                await self._leave()
        except (OSError, ScopeError) as error:
            raise FreezerFailed(f"the group of VMs that may move can't be removed: {error}") from error

    async def _leave(self) -> None:
        """Leaves the fleet. Raises OSError, ScopeError, FreezerFailed."""
        try:
            top = await self._find_top()
        except FreezerFailed:
            # There can be none.
            top = None
        if top is None or not _is_group(top / _cgroups.FROZEN):
            await self._remove_rest(top)
            return
        if self._deadline is None:
            self._deadline = await trio.to_thread.run_sync(self._open_shared)
        self._group = top / _cgroups.FROZEN
        self._deadline.set(math.inf)
        await self.thaw()
        self._host.limits.movable = Cgroups(self._group)
        await self._host.limits.remove_empty()
        if not _is_group(self._group):
            await self._remove_rest(top)

    def _vms(self) -> Path:
        if self._group is None:
            raise FreezerFailed("the group of VMs that may move is not there")
        return self._group

    async def _write(self, value: str) -> None:
        group = self._vms()
        try:
            with trio.fail_after(_FREEZE_S), self._host.watches.open(group / "cgroup.events") as watch:
                # Not in a thread, which may have to wait for a free one.
                (group / _FREEZE).write_text(value)
                if value == "0" and boottime() >= self.until:
                    # The daemon was stopped for a moment.
                    (group / _FREEZE).write_text("1")
                    raise FreezerFailed("the VMs stay frozen, as their time is over")
                while _cgroups.is_frozen(group) != (value == "1"):
                    await watch.wait()
        except trio.TooSlowError:
            what = "freeze" if value == "1" else "thaw"
            raise FreezerFailed(f"the kernel does not {what} all VMs in {group} within {_FREEZE_S:g} s") from None
        except OSError as error:
            raise FreezerFailed(f"the group {group} can't be frozen or thawed: {error}") from error

    # The shared memory

    @property
    def _shared(self) -> Path:
        return self._directory / f"{_SHARED}{self._host.processes.boot_id()}"

    def _open_shared(self) -> Deadline:
        """Opens the shared memory. Raises OSError, FreezerFailed."""
        if warning := make_own_directory(self._directory):
            _logger.warning("%s", warning)
        if self._directory.is_symlink():
            raise FreezerFailed(f"{self._directory} is a symbolic link; remove it")
        path = self._shared
        for other in self._directory.glob(f"{_SHARED}*"):
            if other.name != path.name:
                # The clock began anew with this boot.
                other.unlink()
        with suppress(FileNotFoundError):
            _check_own(path, stat.S_IFREG, 0o077)
        return Deadline(path, write=True)

    # The groups

    async def _establish(self) -> None:
        """Creates or finds the groups and the watchdog. Raises OSError, FreezerFailed."""
        first: ProcessIdentity | None = None
        try:
            with trio.fail_after(_OPEN_S):
                top = await self._find_top()
                if top is None:
                    top, first = await self._make_top()
                self._group = await trio.to_thread.run_sync(self._make_groups, top, first)
                self._host.limits.movable = Cgroups(self._group, stays=True)
                self._watchdog = await self._watch(top)
                self._weight = 0
        except trio.TooSlowError:
            raise FreezerFailed(f"the watchdog did not start within {_OPEN_S:g} s") from None
        except ScopeError as error:
            raise FreezerFailed(f"VMs can't be frozen on this host: {error}") from error
        finally:
            if first is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_S):
                    await self._host.processes.end([first])

    async def _find_top(self) -> Path | None:
        """Returns the top group, if it exists. Raises OSError, ScopeError, FreezerFailed."""
        mounted, root = self._mount()
        if self._scopes is None:
            top = mounted / self._name
        else:
            path = await self._scopes.group_of(self._name)
            if not path:
                return None
            top = mounted / path.removeprefix(root).lstrip("/")
        return top if _is_group(top) else None

    async def _make_top(self) -> tuple[Path, ProcessIdentity | None]:
        """Returns a new top group, and the process without which systemd would remove it, which the caller must end.
        Raises OSError, ScopeError, FreezerFailed."""
        if self._scopes is None:
            top = self._mount()[0] / self._name
            top.mkdir(exist_ok=True)
            _cgroups.enable_controllers(top.parent)
            with suppress(OSError):
                (top / "cpu.weight").write_text(str(_cgroups.ALL_WEIGHT))
            return top, None
        # The watchdog can't be the one, as it needs a group to watch.
        argv = [sys.executable, "-I", "-S", "-c", f"import time; time.sleep({_FIRST_S})", self._name]
        first = await self._host.processes.spawn(
            argv, tag=self._name, env=PROGRAM_ENVIRONMENT, cwd=Path("/"), stdout_path=self._directory / _LOG
        )
        try:
            description = "VMs of Volant that may move to another host"
            await self._scopes.enclose(first.pid, self._name, description, None, delegate=True)
            found = _cgroups.group_of(first.pid)
            if found is None:
                raise FreezerFailed("the group that systemd has made is not visible")
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_S):
                await self._host.processes.end([first])
            raise
        return found, first

    def _make_groups(self, top: Path, first: ProcessIdentity | None) -> Path:
        """Returns the group of the VMs. `first` is moved into the watchdog's group, as otherwise the top group could
        have no groups with limits. Raises OSError."""
        watchdog, group = top / _WATCHDOG, top / _cgroups.FROZEN
        _check_own(top, stat.S_IFDIR)
        watchdog.mkdir(exist_ok=True)
        _check_own(watchdog, stat.S_IFDIR)
        if first is not None:
            _cgroups.move(first.pid, watchdog)
        is_new = not group.exists()
        group.mkdir(exist_ok=True)
        _check_own(group, stat.S_IFDIR)
        if not (group / _FREEZE).exists():
            raise FileNotFoundError(errno.ENOENT, "the kernel can't freeze groups; it is older than 5.2", str(group))
        if boottime() >= self.until or (is_new and not self._is_thawed):
            (group / _FREEZE).write_text("1")
        _cgroups.enable_controllers(top)
        with suppress(OSError):
            # In a sandbox that allows no real-time priority, this is what it has.
            (watchdog / "cpu.weight").write_text(str(_MOST_WEIGHT))
        return group

    def _mount(self) -> tuple[Path, str]:
        """Returns the mount point of the hierarchy, and the group that is mounted there. Raises OSError,
        FreezerFailed."""
        found = _cgroups.mount_of(Path("/proc/self/mountinfo").read_text(errors="replace"))
        if found is None:
            raise FreezerFailed("VMs can't be frozen on this host, as it has no control groups of version 2")
        if self._scopes is None and Path("/run/systemd/system").exists():
            raise FreezerFailed(
                "VMs can't be frozen by this daemon: systemd manages the control groups of this host, and has not "
                "started it"
            )
        return found

    async def _weigh(self) -> None:
        """Gives the scope the combined shares of its processes, so that they are equal to processes of other VMs.
        Without systemd a directory of groups has the shares of one process anyway."""
        if self._scopes is None or self._group is None:
            return
        try:
            weight = await trio.to_thread.run_sync(_weight_of, self._group)
            if weight != self._weight:
                await self._scopes.weigh(self._name, weight)
                self._weight = weight
        except (ScopeError, OSError) as error:
            _logger.warning("VMs that may move get little processor time when the host is busy: %s", error)

    async def _remove_rest(self, top: Path | None) -> None:
        """Removes everything except the frozen group, which no longer exists. Raises OSError, FreezerFailed."""
        self._group = self._host.limits.movable = None
        try:
            with trio.fail_after(_END_S):
                # It ends by itself a moment after the group.
                await self._host.processes.end_all(self._tag, self._watchdog)
                while top is not None and _is_group(top):
                    if self._scopes is None:
                        await trio.to_thread.run_sync(_remove_groups, top)
                    # Else systemd removes it. It would not see that its scope is empty if the group was gone before.
                    await trio.sleep(_AGAIN_S)
        except trio.TooSlowError:
            raise FreezerFailed(f"{top} can't be removed, as something is in it") from None
        self._watchdog = self._deadline = None
        await trio.to_thread.run_sync(self._remove_files)

    def _remove_files(self) -> None:
        if self._directory.is_dir() and not self._directory.is_symlink():
            for path in (*self._directory.glob(f"{_SHARED}*"), self._directory / _LOG):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self._directory.rmdir()

    # The watchdog

    async def _watch(self, top: Path) -> ProcessIdentity:
        """Finds or starts the watchdog. Raises OSError, FreezerFailed."""
        host, said = self._host, ""
        for _ in range(_START_TRIES):
            found = await host.processes.find(self._tag)
            if found is None or not self._is_right(found):
                # One of another version, or one whose file was removed.
                await host.processes.end_all(self._tag)
                found, said = await self._start()
            if found is None:
                # One that was just killed may have the file for another moment.
                await trio.sleep(_AGAIN_S)
                continue
            with suppress(ProcessGone), host.processes.open(found) as process:
                if not _cgroups.is_in(top / _WATCHDOG, process.pid):
                    await trio.to_thread.run_sync(_cgroups.move, process.pid, top / _WATCHDOG)
                with suppress(OSError):
                    _priorities.end_last(process.pid)
                if not process.exited:
                    return found
        raise FreezerFailed(f"the watchdog can't be started: {said or 'it ends at once'}")

    def _is_right(self, found: ProcessIdentity) -> bool:
        try:
            arguments = self._host.proc.command_line(found)
            return self._host.proc.has_open(found, self._shared) and str(self._group) in arguments
        except ProcessGone:
            return False

    async def _start(self) -> tuple[ProcessIdentity | None, str]:
        """Returns the watchdog once it watches; otherwise None, and its output. Raises OSError."""
        log = self._directory / _LOG
        log.unlink(missing_ok=True)
        ours, its = os.pipe2(os.O_CLOEXEC)
        async with trio.lowlevel.FdStream(ours) as ready:
            try:
                argv = [sys.executable, "-I", "-S", _watchdog.__file__, str(self._shared), str(self._group), self._tag]
                identity = await self._host.processes.spawn(
                    [*argv, str(its)],
                    tag=self._tag,
                    env=PROGRAM_ENVIRONMENT,
                    cwd=Path("/"),
                    stdout_path=log,
                    descriptors=[its],
                )
            finally:
                os.close(its)
            if await ready.receive_some(100):
                return identity, ""
        return None, log.read_text(errors="replace")[-300:].strip()


def _weight_of(group: Path) -> int:
    """Returns the sum of the weights of the groups in a group."""
    total = 0
    for each in group.iterdir():
        if each.is_dir():
            try:
                total += int((each / "cpu.weight").read_text())
            except (OSError, ValueError):
                total += _WEIGHT
    return min(max(total, _WEIGHT), _MOST_WEIGHT)


def _remove_groups(top: Path) -> None:
    for group in (top / _WATCHDOG, top):
        # Something may still be in it.
        with suppress(OSError):
            group.rmdir()


def _is_group(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_own(path: Path, kind: int, others: int = 0o022) -> None:
    """Checks that a path belongs to the daemon, that others have none of these rights, and that it is no link. Raises
    OSError."""
    found = path.lstat()
    if stat.S_IFMT(found.st_mode) != kind or (kind == stat.S_IFREG and found.st_nlink != 1):
        raise PermissionError(errno.EACCES, "it is not what the daemon makes there; remove it", str(path))
    if found.st_uid != os.geteuid() or found.st_mode & others:
        raise PermissionError(errno.EACCES, "other users own it or can change it; remove it", str(path))
