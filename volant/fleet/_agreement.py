"""Changes that follow each other: each is made on top of the one that its host has seen last, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from ._errors import EtcdError, OutcomeUnknown
from ._interface import Entry, KeyValues, Step, absent, put, unchanged

AGREED = "agreed"
"""The key that each change writes: the id of the change."""
CHANGED = "changed/"
_WRITE_S = 15.0
_PAUSE_S = 0.5


class Agreement:
    """Makes changes for one host, which makes one at a time.

    :param new_id: makes up what identifies a change
    """

    def __init__(self, etcd: KeyValues, host: str, new_id: Callable[[], str]) -> None:
        self._etcd = etcd
        self._mine = CHANGED + host
        self._new_id = new_id

    async def newest(self) -> Entry | None:
        """Returns the newest change, as the quorum has it now; None: there was none. :raises EtcdError:"""
        return await self._etcd.get(AGREED)

    async def make(self, after: Entry | None, steps: Sequence[Step]) -> tuple[bytes, int] | None:
        """Makes a change after another one, at most 126 steps; returns its id and revision. None: another one was
        made in between, and nothing was done. It is not cancelled halfway.

        :raises EtcdError: nothing was done, and will not be. :raises OutcomeUnknown: it may have been done, or will be.
        """
        change = self._new_id().encode()
        with trio.move_on_after(_WRITE_S, shield=True):
            return await self._certain(change, after, steps)
        raise OutcomeUnknown(f"etcd has not said within {_WRITE_S:g} s whether it was done")

    async def _certain(self, change: bytes, after: Entry | None, steps: Sequence[Step]) -> tuple[bytes, int] | None:
        """Asks until the answer is certain. The condition lets only one of the requests be carried out, however late
        they come; and only this host writes `changed/HOST`, so that says whether one was."""
        conditions = [absent(AGREED) if after is None else unchanged(after)]
        steps = [put(AGREED, change), put(self._mine, change), *steps]
        sent = False
        while True:
            try:
                done = await self._etcd.transact(conditions, steps)
                if done.done:
                    return change, done.revision
                mine = await self._etcd.get(self._mine) if sent else None
                return (change, mine.modified) if mine is not None and mine.value == change else None
            except OutcomeUnknown:
                sent = True
            except EtcdError:
                if not sent:
                    raise
            await trio.sleep(_PAUSE_S)
