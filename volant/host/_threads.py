"""The facet for worker threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


class Threads(Protocol):
    async def run(self, call: Callable[..., T], *args: object) -> T:
        """Runs a call that blocks on the disk in a worker thread. It is not cancelled half-way."""


class LinuxThreads(Threads):
    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(call, *args)
