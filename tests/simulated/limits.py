"""Control groups and the sandbox of the simulated host: groups exist, limits do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from volant.host import Grant, Limits, ResourceLimits, SandboxAccess, SandboxSupport
from volant.model import ProcessIdentity

from .calls import Calls


class SimLimits(Limits):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def apply(
        self,
        identity: ProcessIdentity,
        description: str,
        limits: ResourceLimits | None = None,
        *,
        expendable: bool = False,
    ) -> None:
        def move() -> None:
            machine = self._calls.machine
            process = machine.processes.get(identity.pid)
            if process is not None and process.alive:
                machine.groups[identity.tag] = identity.pid
                process.is_expendable = process.is_expendable and expendable

        await self._calls.run(move)

    async def enclose(self, identity: ProcessIdentity, limits: ResourceLimits | None) -> None:
        raise NotImplementedError

    def is_frozen(self, identity: ProcessIdentity) -> bool:
        return False

    async def remove_empty(self, ended: str | None = None) -> None:
        await self._calls.run(self._calls.machine.remove_empty_groups)

    def of(self, identity: ProcessIdentity) -> dict[str, str] | None:
        return None

    def oom_events(self, identity: ProcessIdentity) -> Path | None:
        return None

    def oom_kills(self, events: Path) -> int:
        return 0


class SimSandboxAccess(SandboxAccess):
    """There is no sandbox."""

    def support(self, directories: Sequence[Path]) -> SandboxSupport | None:
        return None

    def group_of(self, device: Path) -> int | None:
        return None

    async def grant(self, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        raise NotImplementedError

    async def lend_directory(self, path: Path, user: int, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        raise NotImplementedError

    async def share_directory(self, path: Path, user: int, below: Sequence[Path]) -> None:
        raise NotImplementedError
