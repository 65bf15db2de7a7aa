"""The build of the browser plugin names missing programs and their packages before it downloads anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .kit import ENVIRONMENT, ROOT

BUILD = ROOT / "examples/browser/build.py"
WITHOUT = """
import runpy, shutil, sys
which, lacks = shutil.which, sys.argv.pop(1)
shutil.which = lambda program, **options: None if program == lacks else which(program, **options)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("lacks", "package"), [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs")]
)
def test_a_missing_program_and_its_package_are_named(tmp_path: Path, lacks: str, package: str) -> None:
    output = tmp_path / "browser"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, lacks, str(BUILD), "--output", str(output)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: There is no {lacks} on this host (sudo apt-get install {package})\n"
    assert not output.exists()
