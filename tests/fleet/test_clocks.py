"""The clocks that the test bed gives its hosts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.fleet.clocks import TimeNamespace, WallClock, needs_faketime

pytestmark = [
    pytest.mark.programs,
    needs_faketime,
    pytest.mark.skipif(os.getuid() != 0, reason="makes time namespaces as root"),
]

_SHOW = "import os, time; print(time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), os.getpid())"


def test_a_wall_clock_is_moved_alone_and_the_others_are_those_of_another_machine(tmp_path: Path) -> None:
    wall_clock = WallClock(tmp_path / "clock")
    with closing(TimeNamespace(1000, 50_000)) as times:
        for ahead_s in (0, 3600, -7200):
            wall_clock.set(ahead_s)
            command = ["sh", "-c", f'exec {wall_clock.command} nsenter --time={times.path} "$@"', "sh"]
            with subprocess.Popen([*command, sys.executable, "-c", _SHOW], stdout=subprocess.PIPE) as shown:
                assert shown.stdout is not None
                wall, monotonic, boottime, pid = map(float, shown.stdout.read().split())
            off = (wall - time.time(), monotonic - time.monotonic(), boottime - time.clock_gettime(time.CLOCK_BOOTTIME))
            for found, wanted in zip(off, (ahead_s, 1000, 50_000), strict=True):
                assert wanted - 500 < found <= wanted + 0.1
            assert pid == shown.pid, "signals reach it"
