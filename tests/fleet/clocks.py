"""Clocks that differ from host to host, and wall clocks that are set while a host runs.

CLOCK_MONOTONIC and CLOCK_BOOTTIME are those of a time namespace: as if each machine had been booted at another time,
and had slept. CLOCK_REALTIME is moved by libfaketime, for the daemon alone: it gives its children an environment of
their own, so hypervisors and the watchdog do without, and guests have the time that the daemon gives them. etcd is Go
and asks the kernel without libc: its wall clock can't be moved.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
FURTHEST_S = 86400
"""How far a wall clock is moved at most. Events are kept for a week."""
EARLIER: Sequence[str] = ("faketime", "-f", "-2d")
"""Runs the command that follows two days ago: certificates have to be valid with a wall clock that is behind."""

needs_faketime = pytest.mark.skipif(_LIBRARY is None, reason="libfaketime is not installed (.ci/system-packages)")


class WallClock:
    """The wall clock of a daemon, `ahead_s` ahead of the true one. Moves are seen within two seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)

    def set(self, ahead_s: int) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{ahead_s:+d}\n")
        # Hosts may be users of their own, and no half of it is ever read.
        beside.chmod(0o644)
        beside.rename(self._path)

    @property
    def command(self) -> str:
        """The begin of a command that has this clock, and the same pid."""
        settings = {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # What it would leave in /dev/shm if it is killed.
            "FAKETIME_DISABLE_SHM": "1",
            # Files don't change when the clock is set.
            "NO_FAKE_STAT": "1",
        }
        return shlex.join(["env", *(f"{name}={value}" for name, value in settings.items())])


class TimeNamespace:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME, so many seconds ahead of this machine's. Exists while it is open, or has a
    process."""

    def __init__(self, monotonic_s: int, boottime_s: int) -> None:
        # For children alone, and this process has threads: so another one makes it.
        with subprocess.Popen(
            ["unshare", "--time", f"--monotonic={monotonic_s}", f"--boottime={boottime_s}", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as maker:
            assert maker.stdin is not None
            assert maker.stdout is not None
            maker.stdin.write(b"\n")
            maker.stdin.flush()
            assert maker.stdout.read(1), "no time namespace can be made"
            self._descriptor = os.open(f"/proc/{maker.pid}/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """For `nsenter --time`, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        os.close(self._descriptor)
