"""A simulated passt: it listens at its socket for one hypervisor, and ends with that connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from .file_system import File, SocketName
from .listener import SimListener, hang_up
from .process import SimProcess

if TYPE_CHECKING:
    from .machine import Machine


class SimPasst:
    """A process of passt."""

    def __init__(self, machine: Machine, process: SimProcess, argv: Sequence[str]) -> None:
        self.process = process
        self.has_client = False
        self._client: trio.abc.Stream | None = None
        self._listener = SimListener()
        machine.files.put(Path(argv[argv.index("--log-file") + 1]), File())
        machine.files.put(Path(argv[argv.index("--socket") + 1]), SocketName(self._listener))

    async def run(self) -> None:
        """Runs the process until it ends."""
        with trio.CancelScope() as scope:
            self.process.on_end = scope.cancel
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        stream = await self._listener.accept()
                        if self._client is not None:
                            hang_up(stream)
                            continue
                        self._client = stream
                        self.has_client = True
                        nursery.start_soon(self._serve, stream)
            finally:
                self._listener.close()
                self.has_client = False
                if self._client is not None:
                    hang_up(self._client)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        try:
            while await stream.receive_some(4096):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.process.end(0)
