"""Notes of which daemon uses what in a cache."""

from __future__ import annotations

from pathlib import Path

from volant.store import Users

ONE, TWO = "1" * 64, "2" * 64


def test_a_note_stays_until_it_is_forgotten_or_its_daemon_is_gone(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    users = Users(tmp_path / "users")
    assert users.of(ONE) == []
    for digest in (ONE, TWO):
        users.note(digest, own)
    users.note(ONE, other)
    assert users.of(ONE) == [other, own]
    users.forget_others(own, {TWO})
    assert (users.of(ONE), users.of(TWO)) == ([other], [own])
    other.rmdir()
    assert users.of(ONE) == []
    assert not users.is_noted(ONE, other)
    assert [path.name for path in (tmp_path / "users").iterdir()] == [TWO]


def test_what_somebody_else_left_in_the_directory_is_no_note(tmp_path: Path) -> None:
    users = Users(tmp_path)
    (tmp_path / ONE).write_text("a file")
    (tmp_path / TWO).mkdir()
    (tmp_path / TWO / "note").write_bytes(b"/\0\xff")
    (tmp_path / TWO / "directory").mkdir()
    assert users.of(ONE) == []
    users.forget_others(tmp_path, ())
    users.of(TWO)
    assert (tmp_path / ONE).read_text() == "a file"
