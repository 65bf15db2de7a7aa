"""Positions in the events of all hosts, as one text."""

from __future__ import annotations

import pytest

from volant.fleet import OLDEST, position_text, positions_in
from volant.model import EventId


@pytest.mark.parametrize(
    "positions",
    [
        {},
        {1: EventId("0123456789ab", 0)},
        {1: OLDEST, 2: EventId("odd", 7), 999: EventId("00ff", 10**15)},
        {number: EventId(f"{number:012x}", number * 1000) for number in range(1, 101)},
    ],
    ids=["none", "one", "kinds", "hundred"],
)
def test_positions_are_read_as_they_were_written(positions: dict[int, EventId]) -> None:
    text = position_text(positions)
    assert positions_in(text) == positions
    assert len(text) <= 1 + 19 * max(1, len(positions))
    # So that no host takes it for the id of an event of its own.
    assert EventId.parse(text) is None


@pytest.mark.parametrize(
    "text", ["", "*!", "*A", "*AQY", "*AACA", "*gICAgICAgICAgICAAQ", "5f3a-7", "*" + "A" * 40_000, "*é", "*AYMKaGkB"]
)
def test_what_is_no_position_is_none(text: str) -> None:
    assert positions_in(text) is None
