"""Lines have exact positions: a reader that resumes at one gets the rest, and nothing twice."""

from __future__ import annotations

from hypothesis import given, strategies as st

from volant.logs import MAX_LINE_BYTES
from volant.session._lines import Line, LineSplitter


def test_lf_and_crlf_end_lines_and_the_rest_waits() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\r\nb\n\nrest") == [Line(b"a", False, 3), Line(b"b", False, 5), Line(b"", False, 6)]
    assert splitter.feed(b" of it\n") == [Line(b"rest of it", False, 17)]
    assert splitter.flush() == []


def test_a_line_too_long_is_split_between_characters_and_marked() -> None:
    text = "ä" * MAX_LINE_BYTES
    splitter = LineSplitter()
    lines = splitter.feed(text.encode() + b"\n")
    assert [line.partial for line in lines] == [True] * (len(lines) - 1) + [False]
    assert all(len(line.data) <= MAX_LINE_BYTES + 2 for line in lines)
    assert "".join(line.data.decode() for line in lines) == text


def test_a_gap_ends_the_line_that_it_cuts() -> None:
    splitter = LineSplitter()
    splitter.feed(b"half")
    assert splitter.skip_to(100) == [Line(b"half", False, 4)]
    assert splitter.feed(b"x\n") == [Line(b"x", False, 102)]


@given(st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b"\r\n", b"\xff", b"y" * 70_000]), max_size=12), st.data())
def test_resuming_at_the_end_of_any_line_gives_the_same_lines(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.flush()
    assert sum(len(line.data) for line in lines) <= len(whole)
    seen = data.draw(st.integers(0, len(lines)))
    position = lines[seen - 1].end if seen else 0
    again = LineSplitter(position)
    assert again.feed(whole[position:]) + again.flush() == lines[seen:]
