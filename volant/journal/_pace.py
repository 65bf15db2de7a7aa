"""How fast the lines of one VM get into its log.

A line costs the daemon two microseconds and a byte up to thirty nanoseconds, so a guest that writes nothing but line
feeds would keep a processor busy with 25 kB of them a millisecond. So there is a pace for each VM, a quarter of a
processor, beyond which its pumps wait: the workload is held back by that, and its console grows in its file. And there
are turns for all of them, so that whatever a hundred guests write, no request waits for more than some milliseconds of
it.
"""

from __future__ import annotations

import trio

from volant._turns import Bucket, Turns

BYTES_PER_LINE = 128
"""So many bytes cost as much as a line."""
LINES_PER_TURN = 2000
_LINES_PER_S = 100_000.0
_BURST = 100_000.0


def log_turns() -> Turns:
    """The turns that all logs of a daemon share."""
    return Turns(LINES_PER_TURN)


class Pace:
    """That of one VM's log."""

    def __init__(self, turns: Turns, vm_id: int) -> None:
        self._turns = turns
        self._vm_id = vm_id
        self._bucket = Bucket(_LINES_PER_S, _BURST)

    async def keep(self, lines: int, size: int) -> None:
        """After so many lines of `size` bytes in all: wait until it is this VM's turn again."""
        cost = lines + size / BYTES_PER_LINE
        await trio.sleep(self._bucket.spend(cost, trio.current_time()))
        await self._turns.take(self._vm_id, int(cost))
