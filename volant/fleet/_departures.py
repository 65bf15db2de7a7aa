"""The decision where a VM goes on that has been copied to another host: one transaction, which its host asks for.

`docs/explanation/fleet.md` has the steps before and after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from volant.concurrency import Backoff
from volant.model import Leaving

from ._claims import Claim, Claims
from ._errors import EtcdError

_RETRY_S, _RETRY_MAX_S = 0.2, 5.0
_ABSENT_TTLS = 2
"""For so many TTLs the claim of a VM that may have been given away has to be missing before its host keeps it: etcd may
have lost all it had, and the other host is about to claim it again."""
_logger = logging.getLogger("volant.fleet")


class Departures:
    """Gives VMs of this host to others."""

    def __init__(self, claims: Claims, host: str, *, ttl_s: float, now: Callable[[], float]) -> None:
        self._claims = claims
        self._host = host
        self._ttl_s = ttl_s
        self._now = now

    async def conclude(self, name: str, leaving: Leaving, *, give: bool = True) -> bool:
        """Returns whether a VM that is paused goes on at the other host, once that is certain; else it may go on here.

        Waits as long as etcd does not answer.

        :param give: whether to give it away, if that has not been done; else it stays if it was not
        """
        mine = Claim(leaving.vm, self._host, leaving.epoch)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        absent_since: float | None = None
        while True:
            try:
                if give and await self._claims.hand_over(name, mine, leaving.id, leaving.to_host, leaving.arrival):
                    return True
                if not await self._claims.hold(name, mine):
                    return True
                if await self._claims.get(name) is not None:
                    return False
            except EtcdError as error:
                if not backoff.next_s > _RETRY_S:
                    _logger.warning("%s stays paused until etcd says whether it has moved: %s", name, error)
            else:
                absent_since = self._now() if absent_since is None else absent_since
                if self._now() - absent_since > _ABSENT_TTLS * self._ttl_s:
                    return False
            await backoff.pause()
