"""A bandwidth that all transfers of a daemon share."""

from __future__ import annotations

import trio

from volant.concurrency import TokenBucket

_BURST_S = 0.25


class Throttle:
    """Bounds how many bytes a second are sent and received. A transfer that spends more than there is waits."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """None: no bound."""
        self._bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, bytes_per_s * _BURST_S)

    async def spend(self, count: int) -> None:
        """Returns once `count` more bytes fit into the bandwidth."""
        wait_s = 0.0 if self._bucket is None else self._bucket.spend(count, trio.current_time())
        if wait_s > 0:
            await trio.sleep(wait_s)
