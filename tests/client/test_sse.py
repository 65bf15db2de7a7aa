"""The parser of server-sent events keeps to the standard however the stream is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from volant.client._sse import Message, SseParser

STREAM = (
    b'\xef\xbb\xbfretry: 1000\r\n\r\nid: 1\r\nevent: A\r\ndata: {"x":\r\ndata:1}\r\n\r\n: comment\rdata: \xc3\xa4\r\r'
    b"id: 3\n\nid: bad\0\nunknown: x\ndata\n\n"
)
MESSAGES = [
    Message("A", '{"x":\n1}', "1"),
    Message("message", "ä", "1"),
    Message("message", None, "3"),
    Message("message", "", "3"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_messages_do_not_depend_on_how_the_stream_is_cut(cuts: list[int]) -> None:
    parser = SseParser()
    places = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:end] for start, end in pairwise(places)]
    assert [message for chunk in chunks for message in parser.feed(chunk)] == MESSAGES
    assert parser.retry_s == 1.0


def test_an_incomplete_tail_is_no_message() -> None:
    assert SseParser().feed(b"id: 1\ndata: x\n") == []


def test_a_block_without_end_takes_no_more_than_4_mib() -> None:
    parser = SseParser()
    for _ in range(63):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")
    with pytest.raises(ValueError, match="larger than 4 MiB"):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")


def test_many_small_blocks_are_not_taken_for_one_large() -> None:
    parser = SseParser()
    assert sum(len(parser.feed(b"data: x\n\n" * 7000)) for _ in range(100)) == 700_000
