"""Background tasks that end with a block of code."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_helpers() -> AsyncIterator[trio.Nursery]:
    """Opens a nursery whose tasks are cancelled when the block ends.

    An exception of the block leaves as it is; Trio alone would wrap it in a group, as any task could have raised it. An
    exception of a task cancels the block and leaves in a group.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
