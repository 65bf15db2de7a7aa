"""Files that settings name are regular, and not larger than allowed; anything else is refused with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from volant.daemon._protection import UnreadableFile, read_given


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8)
    assert read_given(path, 8) == b"x" * 8
    with pytest.raises(UnreadableFile, match="is larger than 7 bytes"):
        read_given(path, 7)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFile, match="is not a regular file"):
        read_given(tmp_path / "pipe", 8)
    with pytest.raises(UnreadableFile, match=r"can't be read: Is a directory|is not a regular file"):
        read_given(tmp_path, 8)
    with pytest.raises(UnreadableFile, match="can't be read: No such file"):
        read_given(tmp_path / "none", 8)
