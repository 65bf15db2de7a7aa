"""The facet that places processes in control groups, limits their resources, and lowers their priority."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import trio

from volant.model import ProcessIdentity

from . import _cgroups, _priorities
from ._cgroups import Cgroups, ResourceLimits
from ._processes import Processes
from ._procfs import ProcessGone
from ._scopes import ScopeError, Scopes

_logger = logging.getLogger("volant.host")

_LOWER_AGAIN_S, _LOWER_TRIES = 0.25, 40
"""The delay and the number of attempts: without CAP_SYS_ADMIN, the kernel accepts ten changes per second for all
processes."""


class Limits(Protocol):
    async def apply(
        self,
        identity: ProcessIdentity,
        description: str,
        limits: ResourceLimits | None = None,
        *,
        expendable: bool = False,
    ) -> None:
        """Moves a process out of the daemon's control group, so that systemd's actions on the daemon do not affect it,
        and limits its resources, as far as the host can.

        With systemd, it moves to the scope `<tag>.scope`; otherwise to the control group `<tag>`. If the host allows
        neither, it stays, and a warning is logged. A process that is in such a group already, or in one of `enclose`,
        stays there. May take 10 s, as the kernel limits changes of priorities.

        :param limits: None for no limits
        :param expendable: whether the kernel ends this process first if the host runs out of memory. A process starts
            like that
        """

    movable: Cgroups | None = None
    """The parent of the groups of `enclose`, set by the `Freezer`; None without a fleet."""

    async def enclose(self, identity: ProcessIdentity, limits: ResourceLimits | None) -> None:
        """Moves a process into a separate group below one that the `Freezer` can freeze as a whole. Raises ProcessGone,
        OSError."""

    def is_frozen(self, identity: ProcessIdentity) -> bool:
        """Returns whether a process is frozen, or is about to be, because of its group. It can then only be killed."""

    async def remove_empty(self, ended: str | None = None) -> None:
        """Removes the control groups of ended processes, if the daemon created them. `ended` is the tag of an exiting
        process; its group is awaited, up to a second."""

    def of(self, identity: ProcessIdentity) -> dict[str, str] | None:
        """Returns the limits that the kernel applies to a process, by the names of the files in its control group; None
        if it has no separate group."""

    def oom_events(self, identity: ProcessIdentity) -> Path | None:
        """Returns the file that changes when the kernel kills a process for lack of memory; None if there is none."""

    def oom_kills(self, events: Path) -> int:
        """Returns the number of processes killed for lack of memory. Raises OSError."""


class LinuxLimits(Limits):
    def __init__(
        self, processes: Processes, scopes: Scopes | None, groups: Cgroups | None, *, lowers: bool = False
    ) -> None:
        """:param lowers: whether processes get less processor time than the daemon"""
        self._processes = processes
        self._scopes = scopes
        self._groups = groups
        self._lowers = lowers
        self._moves: WeakValueDictionary[ProcessIdentity, trio.Lock] = WeakValueDictionary()

    async def apply(
        self,
        identity: ProcessIdentity,
        description: str,
        limits: ResourceLimits | None = None,
        *,
        expendable: bool = False,
    ) -> None:
        if not expendable and not self._end_by_size(identity):
            return
        async with self._moving(identity):
            freezable = _freezable_group(identity)
            try:
                if freezable is not None:
                    # In another group, it would keep running while its VM must be frozen.
                    await self._limit(freezable, limits)
                elif self._scopes is not None:
                    await self._scopes.enclose(identity.pid, identity.tag, description, limits)
                elif self._groups is not None:
                    await trio.to_thread.run_sync(self._groups.enclose, identity.pid, identity.tag, limits)
            except (ScopeError, OSError) as error:
                _logger.warning("process %d stays in the daemon's control group: %s", identity.pid, error)
        if self._lowers:
            await self._lower(identity)

    def _moving(self, identity: ProcessIdentity) -> trio.Lock:
        """Returns the lock that is held while a process is moved, so that `apply` can't move it out of the group that
        `enclose` put it in."""
        return self._moves.setdefault(identity, trio.Lock())

    async def enclose(self, identity: ProcessIdentity, limits: ResourceLimits | None) -> None:
        groups = self.movable
        if groups is None:
            raise FileNotFoundError(errno.ENOENT, "there is no group that is frozen as a whole")
        group = groups.directory / identity.tag
        async with self._moving(identity):
            with self._processes.open(identity) as process:
                # Limits are set afterwards, as their failure is only a warning.
                await trio.to_thread.run_sync(groups.enclose, process.pid, identity.tag, None)
                if process.exited:
                    raise ProcessGone(f"process {identity.pid} has ended")
            await self._limit(group, limits)

    async def _limit(self, group: Path, limits: ResourceLimits | None) -> None:
        if limits is None:
            return
        try:
            await trio.to_thread.run_sync(_cgroups.limit, group, limits)
        except FileNotFoundError:
            pass  # it has ended, and its group is removed
        except OSError as error:
            _logger.warning("the limits of %s are not set: %s", group.name, error)

    def _end_by_size(self, identity: ProcessIdentity) -> bool:
        """Lets the kernel end a process by its size if memory runs out. Returns whether the process still exists."""
        try:
            with self._processes.open(identity) as process:
                _priorities.end_by_size(process.pid)
        except ProcessGone:
            return False
        except (OSError, ValueError) as error:
            _logger.warning(
                "the kernel will end process %d first if memory runs out, as its score can't be lowered: %s",
                identity.pid,
                error,
            )
        return True

    async def _lower(self, identity: ProcessIdentity) -> None:
        for _ in range(_LOWER_TRIES):
            try:
                with self._processes.open(identity) as process:
                    _priorities.lower(process.pid)
                return
            except BlockingIOError:
                await trio.sleep(_LOWER_AGAIN_S)
            except (ProcessGone, OSError):
                # Not fatal: busy guests only slow the daemon down.
                return

    def is_frozen(self, identity: ProcessIdentity) -> bool:
        group = _freezable_group(identity)
        return group is not None and _cgroups.is_to_freeze(group.parent)

    async def remove_empty(self, ended: str | None = None) -> None:
        for groups in (self._groups, self.movable):
            if groups is not None:
                await trio.to_thread.run_sync(groups.remove_empty, ended)

    def of(self, identity: ProcessIdentity) -> dict[str, str] | None:
        group = _own_group(identity)
        return None if group is None else _cgroups.limits_in(group)

    def oom_events(self, identity: ProcessIdentity) -> Path | None:
        group = _own_group(identity)
        return None if group is None else _cgroups.events_of(group)

    def oom_kills(self, events: Path) -> int:
        return _cgroups.oom_kills(events.read_text())


def _own_group(identity: ProcessIdentity) -> Path | None:
    try:
        group = _cgroups.group_of(identity.pid)
    except OSError:
        return None
    return group if group is not None and group.name in (identity.tag, f"{identity.tag}.scope") else None


def _freezable_group(identity: ProcessIdentity) -> Path | None:
    """Returns the group of a process if it is below the group of the `Freezer`."""
    try:
        group = _cgroups.group_of(identity.pid)
    except OSError:
        return None
    return group if group is not None and _cgroups.is_frozen_as_a_whole(group.parent) else None
