"""PID 1 starts an agent that died, and gives up on one that keeps dying."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

import pytest

from volant.guest import _init


class Exit(Exception):
    """The end of PID 1, which panics the guest."""


class Guest:
    """What PID 1 calls, and the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.killed: list[signal.Signals] = []
        self.agents = 1

    def monotonic(self) -> float:
        return self.now

    def start_agent(self, signals: set[signal.Signals]) -> int:
        self.agents += 1
        return self.agents

    def exit(self, code: int) -> NoReturn:
        raise Exit(code)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    guest = Guest()
    monkeypatch.setattr(_init, "time", guest)
    monkeypatch.setattr(_init, "say", guest.said.append)
    monkeypatch.setattr(_init, "_signal_all", guest.killed.append)
    monkeypatch.setattr(_init, "_start_agent", guest.start_agent)
    monkeypatch.setattr(os, "_exit", guest.exit)
    return guest


def test_the_fifth_death_of_an_agent_within_a_minute_ends_pid_1(guest: Guest) -> None:
    starts = [guest.now]
    for number in range(4):
        guest.now += 14.9
        assert _init._respawn({signal.SIGCHLD}, starts) == number + 2
    # The processes of a dead agent have lost their pipes.
    assert guest.killed == [signal.SIGKILL] * 4
    with pytest.raises(Exit, match="1"):
        _init._respawn({signal.SIGCHLD}, starts)
    assert guest.agents == 5
    assert guest.said[-1] == "the agent ended 5 times within 60 s: giving up"


def test_an_agent_that_dies_now_and_then_is_always_restarted(guest: Guest) -> None:
    starts = [guest.now]
    for number in range(100):
        guest.now += 15
        assert _init._respawn({signal.SIGCHLD}, starts) == number + 2
    assert len(starts) <= 5
