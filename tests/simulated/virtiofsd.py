"""A simulated virtiofsd: it serves one connection of a hypervisor, and ends with it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import trio

from actors import fault

from .file_system import Files
from .listener import SimListener, hang_up
from .process import SimProcess

HELLO = b"vhost-user"


class SimVirtiofsd:
    """A process of virtiofsd. Its listener is one that the daemon has opened for it."""

    def __init__(self, rng: Random, files: Files, process: SimProcess, listener: SimListener, output: Path) -> None:
        self.process = process
        self._rng = Random(rng.getrandbits(64))
        self._files = files
        self._listener = listener
        self._output = output

    async def run(self) -> None:
        """Runs the process until it ends."""
        connection: trio.abc.Stream | None = None
        with trio.CancelScope() as scope:
            self.process.on_end = scope.cancel
            try:
                await trio.sleep(self._rng.uniform(0.0, 0.1))
                if fault("virtiofsd.exits_at_start"):
                    self._files.append(self._output, b"Error opening the shared directory: Permission denied\n")
                    self.process.end(1)
                connection = await self._listener.accept()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve, connection)
                    nursery.start_soon(self._misbehave)
            finally:
                self._listener.close()
                if connection is not None:
                    hang_up(connection)

    async def _serve(self, connection: trio.abc.Stream) -> None:
        try:
            while await connection.receive_some(4096):
                if fault("virtiofsd.hangs_at_start"):
                    await trio.sleep_forever()
                await connection.send_all(HELLO)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.process.end(0)

    async def _misbehave(self) -> None:
        while True:
            await trio.sleep(self._rng.uniform(5.0, 30.0))
            if fault("virtiofsd.dies"):
                self.process.end(-9)
