"""Runs Debian's Chromium as a client."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
"""The program; None: it is not installed."""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium-headless-shell, or chromium")


@asynccontextmanager
async def visiting(url: str, profile: Path) -> AsyncIterator[None]:
    """Runs a browser that has opened `url`, until the block ends."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", url,
    ]  # fmt: skip
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        # Debian's command is a script: the browser is its child, and has children of its own.
        os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await process.wait()
