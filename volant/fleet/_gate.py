"""Lets a host change nothing that the fleet knows of it while it leaves, and after it has left."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ._errors import EtcdRefused
from ._interface import Compare, KeyValues, Step, Transaction, Wrapper


class Gate(Wrapper):
    """Refuses changes while it is closed."""

    def __init__(self, etcd: KeyValues) -> None:
        super().__init__(etcd)
        self._under_way = 0
        self._idle = trio.Event()
        self._refusal: str | None = None

    async def close(self, refusal: str) -> None:
        """Refuses changes from now on, and waits for the end of those that are under way.

        :param refusal: why they are refused, for people
        """
        self._refusal = refusal
        while self._under_way:
            await self._idle.wait()

    def open(self) -> None:
        """Accepts changes again."""
        self._refusal = None

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if self._refusal is not None:
            raise EtcdRefused(self._refusal)
        self._under_way += 1
        try:
            return await self._etcd.transact(conditions, steps, otherwise)
        finally:
            self._under_way -= 1
            self._idle.set()
            self._idle = trio.Event()
