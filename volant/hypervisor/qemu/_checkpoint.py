"""Copies a machine while it runs.

**After the stop QEMU still handles earlier I/O** of the agent's port: bytes that it reads into the guest's memory, and
buffers that it returns to the guest when the port's socket has space. The port's other end is idle during this time, so
this ends. It has ended when several iterations of QEMU's main loop, one for each command, moved nothing.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from volant.host import Host, ProcessGone
from volant.hypervisor._interface import (
    PAUSED,
    Checkpoint,
    CheckpointCode,
    CheckpointFailed,
    HoldChannel,
    MachineKind,
    MachineSpec,
    Template,
)
from volant.model import ProcessIdentity

from ._argv import format_of, tsc_khz_of
from ._compatibility import STATE_LIMIT
from ._migration import SAVE_S, complete, machine_type, save_devices
from ._qmp import QmpClient, QmpLost, QmpRefused
from ._sandbox import make_state_file

RESUME_S = 10.0
_IDLE_ITERATIONS = 3
_MAX_ITERATIONS = 1000
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG})
_logger = logging.getLogger("volant.hypervisor")


class Checkpointer:
    """Makes one checkpoint. Nothing else may pause or resume the guest at the same time."""

    def __init__(self, host: Host, spec: MachineSpec, identity: ProcessIdentity, qmp: QmpClient) -> None:
        self._host = host
        self._spec = spec
        self._identity = identity
        self._qmp = qmp
        self._size = spec.memory_mb * 1024 * 1024
        self.stuck = False
        """Whether the guest ran before and could not be resumed."""

    async def take(self, into: Path, hold: HoldChannel, timeout_s: float, volumes: Path | None) -> Checkpoint:
        """See `Machine.checkpoint`. Raises CheckpointFailed."""
        code: CheckpointCode
        try:
            with trio.fail_after(timeout_s):
                return await self._take(into, hold, volumes)
        except trio.TooSlowError:
            code, why = "too_slow", f"the machine was not copied within {timeout_s:g} s"
        except (QmpRefused, QmpLost, trio.BrokenResourceError) as error:
            code, why = "refused", str(error)
        except ProcessGone as error:
            code, why = "refused", f"the hypervisor has ended: {error}"
        except PermissionError as error:
            code, why = "not_permitted", f"the hypervisor's memory can't be read: {error}"
        except OSError as error:
            code = "no_space" if error.errno in _NO_ROOM else "io_error"
            why = f"the machine can't be copied to {into}: {error.strerror or error}"
        if self.stuck:
            code, why = "guest_stopped", f"{why}; and the guest could not be resumed"
        raise CheckpointFailed(code, why)

    async def _take(self, into: Path, hold: HoldChannel, volumes: Path | None) -> Checkpoint:
        host, spec = self._host, self._spec
        memory, state, layer = into / "memory", into / "state", into / "root.qcow2"
        written = () if volumes is None else tuple(volume.path for volume in spec.volumes if not volume.read_only)
        kind = await self._kind()
        if spec.template is not None:
            # The template's memory never changes, so it is copied before the guest is paused.
            await host.process_memory.copy_mapped_file(self._identity, self._size, memory)
        saved = await make_state_file(host, spec, self._identity)
        paused_s = 0.0
        async with hold() as unread:
            began = host.clock.monotonic()
            async with self._paused() as was_running:
                await self._settle(unread)
                # The disks were flushed by the stop.
                await save_devices(self._qmp, saved)
                if spec.template is not None:
                    await host.process_memory.copy_own_pages(self._identity, self._size, memory)
                else:
                    await host.files.copy(spec.memory_file, memory)
                if spec.root is not None:
                    await host.files.copy(spec.root.layer, layer)
                for path in written:
                    assert volumes is not None
                    await host.files.copy(path, volumes / path.name)
            if was_running:
                paused_s = host.clock.monotonic() - began
        await host.files.write(state, complete(await host.files.read(saved, STATE_LIMIT), kind.machine))
        await host.files.remove(saved)
        return Checkpoint(
            template=Template(memory, state),
            layer=None if spec.root is None else layer,
            kind=kind,
            paused_s=paused_s,
            memory_bytes=host.disk.used(memory),
            state_bytes=host.files.size(state),
            layer_bytes=0 if spec.root is None else host.disk.used(layer),
            volumes=tuple(path.name for path in written),
        )

    async def _kind(self) -> MachineKind:
        """Returns the kind. The process may be older than the installed QEMU, and than this version of Volant."""
        machine = await machine_type(self._qmp)
        version = await self._qmp.execute("query-version")
        numbers = version.get("qemu") if isinstance(version, dict) else None
        if not isinstance(numbers, dict):
            raise QmpRefused("QEMU does not report its version")
        argv = self._host.proc.command_line(self._identity)
        return MachineKind(
            version=".".join(str(numbers.get(part)) for part in ("major", "minor", "micro")),
            accelerator=self._spec.accelerator,
            machine=machine,
            devices=format_of(argv),
            tsc_khz=tsc_khz_of(argv),
        )

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[bool]:
        """Pauses the guest for the block. Yields whether it was running; if so, it is resumed afterwards."""
        status = await self._status()
        if status in PAUSED:
            yield False
            return
        if status != "running":
            raise QmpRefused(f"the machine can't be copied: QEMU says that it is {status!r}")
        try:
            await self._qmp.execute("stop", timeout_s=SAVE_S)
            yield True
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + RESUME_S):
                await self._resume()
        if self.stuck:
            raise QmpRefused("the machine was copied")

    async def _resume(self) -> None:
        self.stuck = True
        try:
            if await self._status() in PAUSED:
                await self._qmp.execute("cont", timeout_s=RESUME_S)
            self.stuck = False
        except (QmpLost, QmpRefused) as error:
            _logger.error("the guest of process %d was not resumed: %s", self._identity.pid, error)

    async def _settle(self, unread: Callable[[], tuple[int, int]]) -> None:
        """Waits until QEMU has handled all earlier I/O of the agent's port."""
        unchanged, before = 0, unread()
        for _ in range(_MAX_ITERATIONS):
            status = await self._status()
            if status not in PAUSED:
                raise QmpRefused(f"the guest can't be stopped: QEMU says that it is {status!r}")
            after = unread()
            unchanged = unchanged + 1 if after == before else 0
            if unchanged == _IDLE_ITERATIONS:
                return
            before = after
        raise QmpRefused("the machine can't be copied: the agent's port does not become idle")

    async def _status(self) -> str:
        answer = await self._qmp.execute("query-status")
        return str(answer.get("status")) if isinstance(answer, dict) else "unknown"
