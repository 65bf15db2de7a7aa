"""Tasks that help a block and end with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_helpers() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends, however it ends.

    What goes wrong in the block is the block's own and leaves as it is; Trio alone would put it into a group, as it
    could have come from any task. What goes wrong in a helper cancels the block and leaves in a group.
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
