"""Fixtures of several attackers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hypervisor.kit import passable_directory


@pytest.fixture
def root() -> Iterator[Path]:
    with passable_directory() as path:
        yield path
