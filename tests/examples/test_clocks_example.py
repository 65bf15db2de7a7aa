"""The example of deterministic clocks passes, and the summary shows the figures of its system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_passes() -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "actors.testing.plugin",
            "-p",
            "no:cacheprovider",
            "examples/test_clocks",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "25 runs, 93,000 virtual seconds" in ran.stdout
