"""The rate limit of frames, which are measured before they are parsed."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from volant.channel._budget import FRAME_LIMIT, FrameCounter, frame_budget
from volant.channel._stream import LinkLost


def frame(size: int, kind: int = 0) -> bytes:
    return size.to_bytes(3, "big") + bytes([kind]) + bytes(5) + bytes(size)


def price(frames: bytes) -> float:
    return FrameCounter().take(frames, 1_000_000)[2]


@given(st.lists(st.integers(0, 300), max_size=30), st.data())
def test_frames_are_counted_however_the_bytes_are_cut(sizes: list[int], data: st.DataObject) -> None:
    stream = b"".join(map(frame, sizes))
    counter = FrameCounter()
    frames = 0
    while stream:
        chunk = stream[: data.draw(st.integers(1, len(stream)))]
        limit = data.draw(st.integers(1, 5))
        size, count, _ = counter.take(chunk, limit)
        assert count <= limit
        assert 0 < size <= len(chunk)
        assert size == len(chunk) or count == limit
        frames += count
        stream = stream[size:]
    assert frames == len(sizes)


def test_an_overlong_frame_is_seen_at_its_header() -> None:
    FrameCounter().take(frame(FRAME_LIMIT), 1)
    with pytest.raises(LinkLost, match="16385 bytes"):
        FrameCounter().take(frame(FRAME_LIMIT + 1)[:9], 1)


def test_data_pays_for_its_frames_and_empty_ones_wait() -> None:
    budget = frame_budget()
    bulk, empty = price(frame(16384) * 64), price(frame(0) * 2500)
    assert all(budget.spend(bulk, 0.0) == 0.0 for _ in range(10_000))
    assert budget.spend(empty, 0.0) == 0.0
    assert budget.spend(empty, 0.0) == pytest.approx(1.0)
    assert budget.spend(0, 2.0) == 0.0
    assert budget.spend(empty, 1000.0) == 0.0, "what is saved up is bounded"
    assert budget.spend(empty, 1000.0) > 0.9


def test_long_frames_without_data_cost_more() -> None:
    """The daemon parses 16 KiB of settings a hundred times as long as 16 KiB of data."""
    settings, data = frame(16382, kind=4), frame(16384)
    assert price(settings) > 500
    assert price(settings + 4 * data) > 450, "data pays for no more than a few others"
    assert price(frame(8, kind=6)) < 2
