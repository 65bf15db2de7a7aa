"""Changes volumes in guests that run."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from volant.channel import AgentProtocolError, AgentUnreachable
from volant.hypervisor import HypervisorError
from volant.journal import Projection
from volant.model import Problem, Volume, writer_of

from ._process import VmProcess
from ._volume_disks import serial_of


class GuestVolumes(msgspec.Struct, frozen=True):
    """Changes volumes in the guests that have them."""

    projection: Projection
    processes: Mapping[int, VmProcess]

    async def grow(self, volume: Volume) -> None:
        """Has the guest that writes to a volume use its new size. :raises Problem: 503 it can't."""
        row = writer_of(volume.id, self.projection.rows())
        process = None if row is None else self.processes.get(row.id)
        if row is None or process is None or not row.agent_seen:
            # One that is booting looks at the size when it mounts.
            return
        serial, size = serial_of(volume.id), volume.size_mb * 2**20
        try:
            machine = await process.machine()
            await machine.grow_volume(serial, size)
            if process.paused:
                raise AgentUnreachable("its guest is paused")
            await process.agent.mount_volumes({serial: size})
        except (AgentProtocolError, AgentUnreachable, HypervisorError) as error:
            raise Problem(
                503, "volume-not-grown",
                f"volume {volume.name!r} has its new size, and the filesystem in VM {row.name!r} has not yet: {error}",
                vm=row.name, hint="resize it again, to the same size; or restart the VM",
            ) from error  # fmt: skip
