"""What a guest thinks that it is, and how far its clock is from the host's."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import trio

from volant.client import Client, ExecOutput, ExecSession

_ASK_S = 60.0
_CLOCK_TRIES = 5
_SCRIPT = """
cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id
hostname
head -c 16 /dev/urandom | md5sum
cat /run/volant-clone.json
while read line; do echo $EPOCHREALTIME; done
"""


@dataclass(frozen=True)
class Who:
    """What a guest says of itself."""

    random_uuid: str
    """Made by its kernel just now."""
    boot_id: str
    machine_id: str
    hostname: str
    urandom: str
    clone: dict[str, Any]
    """What clones are told: `/run/volant-clone.json`."""
    clock_off_s: float
    """How far its clock is from the host's: seconds ahead, as measured on the shortest way there and back."""
    clock_way_s: float
    """What that took: the clock may be off by half of it more, or less."""


async def who(client: Client, name: str) -> Who:
    """Ask a running clone."""
    with trio.fail_after(_ASK_S):
        async with client.vms.exec_session(name, ["sh", "-c", _SCRIPT]) as session:
            lines = _Lines(session)
            said = [await lines.next() for _ in range(6)]
            measured = [await _clock(session, lines) for _ in range(_CLOCK_TRIES)]
    way, off = min(measured)
    return Who(*said[:5], json.loads(said[5]), clock_off_s=off, clock_way_s=way)


async def _clock(session: ExecSession, lines: _Lines) -> tuple[float, float]:
    """The way there and back, and how far ahead the guest's clock was half-way."""
    sent = time.time()
    await session.send(b"\n")
    shown = float(await lines.next())
    way = time.time() - sent
    return way, shown - sent - way / 2


class _Lines:
    """What a command prints, line by line."""

    def __init__(self, session: ExecSession) -> None:
        self._session = session
        self._buffer = ""

    async def next(self) -> str:
        while "\n" not in self._buffer:
            output = await anext(self._session)
            assert isinstance(output, ExecOutput)
            self._buffer += output.data.decode()
        line, _, self._buffer = self._buffer.partition("\n")
        return line.strip()
