"""Fixtures of all simulation tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silences the logs of simulated daemons."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
