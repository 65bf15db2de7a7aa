"""The type checkers know the reply of a request, and find a handler that returns something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
API = str(HERE / "api.py")
CHECKERS: dict[str, list[str]] = {
    "mypy": ["--strict", "--config-file=", "--python-version=3.11", f"--cache-dir={ROOT / '.mypy_cache'}", API],
    "pyright": [f"--project={HERE}", f"--pythonpath={sys.executable}"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_replies_are_known_and_wrong_handlers_are_found(checker: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", checker, *CHECKERS[checker]],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
