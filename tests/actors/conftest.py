"""Virtual time for every test here, and whole runs that a seed decides."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

T = TypeVar("T")
Simulate = Callable[[Callable[[Random], Awaitable[T]], int], T]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Crashes are what these tests are about."""
    logging.getLogger("actors").setLevel(logging.CRITICAL)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate[object]:
    """Runs an async function on virtual time, its scheduling and its own randomness decided by a seed."""
    run = trio._core._run
    monkeypatch.setattr(run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)

    def simulate(main: Callable[[Random], Awaitable[object]], seed: int) -> object:
        run._r.seed(seed)
        return trio.run(main, Random(seed), clock=MockClock(autojump_threshold=0))

    return simulate
