"""How fast the lines of one VM get into its log.

A line costs the daemon two microseconds and a byte up to thirty nanoseconds, so a guest that writes nothing but line
feeds would keep a processor busy with 25 kB of them a millisecond. So there is a pace for each VM, a quarter of a
processor, beyond which its pumps wait: the workload is held back by that, and its console grows in its file. And there
is a fair share of the event loop for all of them, so that whatever a hundred guests write, no request waits for more
than some milliseconds of it.
"""

from __future__ import annotations

import trio

from volant.concurrency import FairShare, TokenBucket

BYTES_PER_LINE = 128
"""So many bytes cost as much as a line."""
LINES_PER_PASS = 2000
_LINES_PER_S = 100_000.0
_BURST = 100_000.0


def log_share() -> FairShare:
    """Returns the budget that all logs of a daemon share."""
    return FairShare(LINES_PER_PASS)


class Pace:
    """That of one VM's log."""

    def __init__(self, share: FairShare, vm_id: int) -> None:
        self._share = share
        self._vm_id = vm_id
        self._bucket = TokenBucket(_LINES_PER_S, _BURST)

    async def keep(self, lines: int, size: int) -> None:
        """After so many lines of `size` bytes in all: wait until it is this VM's turn again."""
        cost = lines + size / BYTES_PER_LINE
        await trio.sleep(self._bucket.spend(cost, trio.current_time()))
        await self._share.take(self._vm_id, int(cost))
