"""Virtual time for all tests here, and whole runs that a seed decides."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from actors.testing._clock import seeded_scheduling

T = TypeVar("T")
Simulate = Callable[[Callable[[Random], Awaitable[T]], int], T]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Crashes are what these tests are about."""
    logging.getLogger("actors").setLevel(logging.CRITICAL)


@pytest.fixture
def simulate() -> Simulate[object]:
    """Runs an async function on virtual time. A seed decides the order of tasks and the function's own draws."""

    def simulate(main: Callable[[Random], Awaitable[object]], seed: int) -> object:
        with seeded_scheduling(Random(seed)):
            return trio.run(main, Random(seed), clock=MockClock(autojump_threshold=0))

    return simulate
