"""Fixtures of several attackers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that other users can pass through; removed after the test."""
    path = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)
