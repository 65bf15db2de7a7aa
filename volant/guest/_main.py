"""The agent's main program."""

from __future__ import annotations

import os
import time


def main() -> None:
    """Serve until PID 1 says otherwise."""
    line = f"volant: the agent listens, {time.clock_gettime(time.CLOCK_BOOTTIME):.3f} s after the kernel's start\n"
    os.write(2, line.encode())
    time.sleep(1e6)
