"""Bounds the output of a program that outlives the daemon."""

from __future__ import annotations

from pathlib import Path

import trio

from ._host import Host

LOG_LIMIT = 1024 * 1024
"""Bytes of a program's own output, as a guest can make it log errors forever."""
LOG_PAUSE_S = 1.0


async def bound_log(host: Host, path: Path) -> None:
    """Keeps a log within `LOG_LIMIT`, until cancelled or its directory is gone."""
    try:
        while True:
            with host.watches.open(path) as watch:
                await host.files.empty_if_larger(path, LOG_LIMIT)
                await watch.wait()
            # Without the pause, a thousand lines a second would cost a CPU.
            await trio.sleep(LOG_PAUSE_S)
    except OSError:
        pass
