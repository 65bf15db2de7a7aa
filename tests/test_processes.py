"""What tests start does not outlive them, and does not keep them waiting."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from tests.processes import ENDS_WITH_US, read_line

_STARTS = f"""
import os, signal, subprocess
process = subprocess.Popen([*{ENDS_WITH_US}, "sh", "-c", "echo $$; exec sleep 1000"])
signal.pause()
"""


def test_a_program_ends_when_the_tests_are_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTS], stdout=subprocess.PIPE, text=True) as tests:
        try:
            program = os.pidfd_open(int(read_line(tests)))
        finally:
            tests.kill()
    try:
        assert select.select([program], [], [], 30)[0], "it goes on"
    finally:
        os.close(program)


def test_a_silent_program_is_killed() -> None:
    with subprocess.Popen(["sleep", "1000"], stdout=subprocess.PIPE) as silent:
        with pytest.raises(AssertionError, match="printed nothing within"):
            read_line(silent, within_s=0.1)
        assert silent.wait(30) == -signal.SIGKILL
