"""A host with systemd for each test that wants one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.kit import Box, missing

_missing = missing()


@pytest.fixture
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A host that has booted, without Volant."""
    if _missing is not None:
        pytest.skip(_missing)
    # Not before that, as it takes a while to build.
    image_cache: Path = request.getfixturevalue("image_cache")
    box = Box(image_cache)
    try:
        box.start()
        yield box
    finally:
        print(box.tail())
        box.dispose()
