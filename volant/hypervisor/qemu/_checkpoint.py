"""A machine copied while it runs.

**The devices** are saved by a command that was made for Xen, `xen-save-devices-state`: two milliseconds, 120 kB, and a
machine that goes on as one goes on that was just stopped. A migration, which templates are made by, was rejected: it
counts the private memory of a machine that goes on from a template as the machine's own, and puts all of it in the
stream (`x-ignore-shared` speaks of shared memory alone). What Xen's command leaves out are the sections in which a
stream says what machine it is of and with which capabilities it was made, and describes itself. `migrate-incoming` asks
for them, so they are put there (QEMU 10.0; needless once `x-ignore-shared` knows private mappings of files).

**What had come before the stop** QEMU still handles after it: bytes of the agent's port that it reads into the guest's
memory, or room in the port's socket, upon which it hands back buffers of the guest's that were waiting. Nobody reads or
writes at the other end of the port meanwhile, so this comes to an end; and it has when some turns of QEMU's main loop,
of which each command takes one, have moved nothing.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from volant.host import Host, ProcessGone
from volant.hypervisor._interface import (
    STANDS_STILL,
    Checkpoint,
    CheckpointCode,
    CheckpointFailed,
    HoldChannel,
    MachineKind,
    MachineSpec,
    Template,
)
from volant.model import ProcessIdentity

from ._argv import FORMAT
from ._migration import CAPABILITY
from ._qmp import QmpClient, QmpLost, QmpRefused
from ._sandbox import place_to_save

GO_ON_S = 10.0
_SAVE_S = 30.0
_TURNS = 3
_TURNS_LIMIT = 1000
_STATE_LIMIT = 16 * 1024 * 1024
_HEAD = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = 0x07
_SUBSECTION = 0x05
_DESCRIPTION = bytes([0x06]) + struct.pack(">I", 0)
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG})
_logger = logging.getLogger("volant.hypervisor")


class Checkpointer:
    """One, of a machine whose guest nobody else stops or lets go on meanwhile."""

    def __init__(self, host: Host, spec: MachineSpec, identity: ProcessIdentity, qmp: QmpClient) -> None:
        self._host = host
        self._spec = spec
        self._identity = identity
        self._qmp = qmp
        self._size = spec.memory_mb * 1024 * 1024
        self.stuck = False
        """Whether the guest was left standing still although it ran before."""

    async def take(self, into: Path, hold: HoldChannel, timeout_s: float) -> Checkpoint:
        """See `Machine.checkpoint`. Raises CheckpointFailed."""
        code: CheckpointCode
        try:
            with trio.fail_after(timeout_s):
                return await self._take(into, hold)
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
            code, why = "guest_stopped", f"{why}; and the guest could not be let go on"
        raise CheckpointFailed(code, why)

    async def _take(self, into: Path, hold: HoldChannel) -> Checkpoint:
        host, spec = self._host, self._spec
        memory, state, layer = into / "memory", into / "state", into / "root.qcow2"
        kind = await self._kind()
        if spec.template is not None:
            # It never changes, so the guest need not wait for it.
            await host.process_memory.copy_mapped_file(self._identity, self._size, memory)
        saved = await place_to_save(host, spec, self._identity)
        paused_s = 0.0
        async with hold() as on_the_way:
            began = host.clock.monotonic()
            async with self._standing_still() as stopped:
                await self._settle(on_the_way)
                await self._save(saved)
                if spec.template is not None:
                    await host.process_memory.copy_own_pages(self._identity, self._size, memory)
                else:
                    await host.files.copy(spec.memory_file, memory)
                if spec.root is not None:
                    await host.files.copy(spec.root.layer, layer)
            if stopped:
                paused_s = host.clock.monotonic() - began
        await host.files.write(state, complete(await host.files.read(saved, _STATE_LIMIT), kind.machine))
        await host.files.remove(saved)
        return Checkpoint(
            template=Template(memory, state),
            layer=None if spec.root is None else layer,
            kind=kind,
            paused_s=paused_s,
            memory_bytes=host.disk.used(memory),
            state_bytes=host.files.size(state),
            layer_bytes=0 if spec.root is None else host.disk.used(layer),
        )

    async def _kind(self) -> MachineKind:
        """As the process says, which may be of an older QEMU than is installed now, and of an older machine than that
        boots."""
        machine = await self._qmp.execute("qom-get", {"path": "/machine", "property": "type"})
        version = await self._qmp.execute("query-version")
        numbers = version.get("qemu") if isinstance(version, dict) else None
        if not isinstance(numbers, dict):
            raise QmpRefused("QEMU does not say which version it is")
        return MachineKind(
            version=".".join(str(numbers.get(part)) for part in ("major", "minor", "micro")),
            accelerator=self._spec.accelerator,
            machine=str(machine).removesuffix("-machine"),
            devices=FORMAT,
        )

    async def _save(self, state: Path) -> None:
        """The devices; the disk has what the guest has written to it since the stop."""
        arguments = {"filename": str(state), "live": False}
        await self._qmp.execute("xen-save-devices-state", arguments, timeout_s=_SAVE_S)

    @asynccontextmanager
    async def _standing_still(self) -> AsyncIterator[bool]:
        """A block in which the guest stands still; whether it went before, and does so again afterwards."""
        status = await self._status()
        if status in STANDS_STILL:
            yield False
            return
        if status != "running":
            raise QmpRefused(f"the machine can't be copied: QEMU says that it is {status!r}")
        try:
            await self._qmp.execute("stop", timeout_s=_SAVE_S)
            yield True
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GO_ON_S):
                await self._go_on()
        if self.stuck:
            raise QmpRefused("the machine was copied")

    async def _go_on(self) -> None:
        self.stuck = True
        try:
            if await self._status() in STANDS_STILL:
                await self._qmp.execute("cont", timeout_s=GO_ON_S)
            self.stuck = False
        except (QmpLost, QmpRefused) as error:
            _logger.error("the guest of process %d was not let go on: %s", self._identity.pid, error)

    async def _settle(self, on_the_way: Callable[[], tuple[int, int]]) -> None:
        """Return once nothing comes to the guest or from it any more."""
        still, before = 0, on_the_way()
        for _ in range(_TURNS_LIMIT):
            status = await self._status()
            if status not in STANDS_STILL:
                raise QmpRefused(f"the guest can't be stopped: QEMU says that it is {status!r}")
            after = on_the_way()
            still = still + 1 if after == before else 0
            if still == _TURNS:
                return
            before = after
        raise QmpRefused("the machine can't be copied: the agent's port does not come to rest")

    async def _status(self) -> str:
        answer = await self._qmp.execute("query-status")
        return str(answer.get("status")) if isinstance(answer, dict) else "unknown"


def complete(state: bytes, machine: str) -> bytes:
    """Say in a stream of devices what it is of. Raises OSError when it is no such stream."""
    head, rest = state[: len(_HEAD)], state[len(_HEAD) :]
    if head != _HEAD:
        raise OSError(errno.EINVAL, "QEMU has saved the devices in a form that is not known")
    name, section = machine.encode(), b"configuration/capabilities"
    configuration = (
        *(bytes([_CONFIGURATION]), struct.pack(">I", len(name)), name),
        *(bytes([_SUBSECTION, len(section)]), section, struct.pack(">I", 1)),
        *(struct.pack(">I", 1), bytes([len(CAPABILITY)]), CAPABILITY.encode()),
    )
    return head + b"".join(configuration) + rest + _DESCRIPTION
