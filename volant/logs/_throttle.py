"""Limits how fast the lines of a VM get into its log.

A line costs the daemon two microseconds, and a byte up to thirty nanoseconds. A guest that writes nothing but line
feeds would keep a processor busy with 25 kB of them a millisecond. So each VM has a rate limit, a quarter of a
processor, and its pumps wait beyond it: that holds back the workload, and the console grows in its file. All logs also
share the event loop fairly, so no request waits for more than some milliseconds, however many guests write.
"""

from __future__ import annotations

import trio

from volant.concurrency import FairShare, TokenBucket

BYTES_PER_LINE = 128
"""The number of bytes that cost as much as a line."""
LINES_PER_PASS = 2000
_LINES_PER_S = 100_000.0
_BURST = 100_000.0


def log_share() -> FairShare:
    """Returns the budget that all logs of a daemon share."""
    return FairShare(LINES_PER_PASS)


class Throttle:
    """The rate limit of one VM's log."""

    def __init__(self, share: FairShare, vm_id: int) -> None:
        self._share = share
        self._vm_id = vm_id
        self._bucket = TokenBucket(_LINES_PER_S, _BURST)

    async def spend(self, lines: int, size: int) -> None:
        """Count lines of `size` bytes in all, and wait until the VM may write again."""
        cost = lines + size / BYTES_PER_LINE
        await trio.sleep(self._bucket.spend(cost, trio.current_time()))
        await self._share.take(self._vm_id, int(cost))
