"""Log frames are decoded however they are cut, and malformed ones are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from volant.model import agent as wire

frames = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=50)),
    max_size=8,
)


@given(frames, st.integers(1, 30))
def test_frames_are_decoded_the_same_however_they_are_cut(sent: list[tuple[int, int, int, bytes]], step: int) -> None:
    data = b"".join(wire.encode_log_frame(*frame) for frame in sent)
    decoder = wire.LogDecoder()
    got = [frame for at in range(0, len(data), step) for frame in decoder.feed(data[at : at + step])]
    assert got == sent
    assert decoder.pending == 0


def test_a_gap_has_the_number_of_lost_bytes() -> None:
    frame = wire.LogDecoder().feed(wire.encode_gap(wire.FRAME_STDERR_GAP, 10, 5, 2**40))[0]
    assert frame[:3] == (wire.FRAME_STDERR_GAP, 10, 5)
    assert wire.gap_length(frame[3]) == 2**40


@pytest.mark.parametrize(
    "data",
    [
        wire.LOG_HEADER.pack(0, 0, 0, 0),
        wire.LOG_HEADER.pack(5, 0, 0, 0),
        wire.LOG_HEADER.pack(1, 0, 0, wire.MAX_FRAME_BYTES + 1),
        wire.LOG_HEADER.pack(3, 0, 0, 7),
    ],
)
def test_a_malformed_frame_raises_before_its_body_comes(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|gap"):
        wire.LogDecoder().feed(data)
