"""Reads the identity and the clock of a guest."""

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
    """The identity and the clock of a guest."""

    random_uuid: str
    """Random numbers that its kernel has just made."""
    boot_id: str
    machine_id: str
    hostname: str
    urandom: str
    clone: dict[str, Any]
    """The identity that a clone received: `/run/volant-clone.json`."""
    clock_off_s: float
    """Seconds by which its clock is ahead of the host's, measured with the shortest round trip."""
    clock_way_s: float
    """Seconds of that round trip; half of it is the error of the measurement."""


async def who(client: Client, name: str) -> Who:
    """Reads the identity of a running clone."""
    with trio.fail_after(_ASK_S):
        async with client.vms.exec_session(name, ["sh", "-c", _SCRIPT]) as session:
            lines = Lines(session)
            said = [await lines.next() for _ in range(6)]
            measured = [await _clock(session, lines) for _ in range(_CLOCK_TRIES)]
    way, off = min(measured)
    uuid, boot_id, machine_id, hostname, urandom, clone = said
    return Who(uuid, boot_id, machine_id, hostname, urandom, json.loads(clone), clock_off_s=off, clock_way_s=way)


async def _clock(session: ExecSession, lines: Lines) -> tuple[float, float]:
    """Returns the seconds of a round trip, and by how many the guest's clock was ahead in its middle."""
    sent = time.time()
    await session.send(b"\n")
    shown = float(await lines.next())
    way = time.time() - sent
    return way, shown - sent - way / 2


class Lines:
    """Returns the lines that a command prints."""

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
