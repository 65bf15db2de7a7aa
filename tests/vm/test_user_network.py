"""Passt beside a hypervisor: an ordinary stop is no warning, and one that died is started again and reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio

from tests.model.test_decide import create
from volant.model import VmRow, user_lease
from volant.vm import _network


@dataclass
class Processes:
    """Passts that end when they are told to."""

    starts: int = 0
    end: trio.Event = field(default_factory=trio.Event)

    async def start(self, row: VmRow, user: int | None) -> None:
        await trio.lowlevel.checkpoint()
        self.starts += 1

    async def ended(self, vm_id: int) -> None:
        await self.end.wait()
        self.end = trio.Event()


class Deps:
    network = None

    class hypervisor:
        @staticmethod
        def user_of(mark: str, vm_id: int) -> None:
            return None


@pytest.fixture
def passts(monkeypatch: pytest.MonkeyPatch) -> Processes:
    passts = Processes()
    monkeypatch.setattr(_network, "passt_of", lambda deps: passts)
    return passts


@pytest.fixture
def row() -> VmRow:
    return msgspec.structs.replace(create(), id=7, network="user", lease=user_lease("0123456789", 7))


async def keep(passts: Processes, row: VmRow, for_s: float) -> None:
    """Have passt end, and the VM's actor stop looking on after `for_s`."""
    deps: Any = Deps()
    passts.end.set()
    with trio.move_on_after(for_s):
        await _network.keep_user_network(deps, row)


async def test_an_ordinary_stop_is_no_warning(
    passts: Processes, row: VmRow, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    with caplog.at_level(logging.WARNING):
        await keep(passts, row, 0.5)

    assert (passts.starts, caplog.messages) == (1, [])


async def test_one_that_died_is_started_again_and_reported(
    passts: Processes, row: VmRow, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    with caplog.at_level(logging.WARNING):
        await keep(passts, row, 5)

    assert passts.starts == 2
    assert "passt had ended, and was started again" in caplog.text
