"""Files that `volar` writes: whole or not at all, and nothing of the system's takes their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from volant.cli._downloads import download


def test_a_link_is_replaced_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "else").write_bytes(b"else")
    link = tmp_path / "link"
    link.symlink_to("else")
    with download(link, 0o600) as file:
        file.write(b"new")
    assert (link.is_symlink(), link.read_bytes(), (tmp_path / "else").read_bytes()) == (False, b"new", b"else")


def test_what_standard_output_stands_for_is_written_to(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "redirected", os.O_WRONLY | os.O_CREAT)
    try:
        # As /dev/stdout is one. What can be removed there is removed as root.
        link = Path(f"/proc/self/fd/{fd}")
        with download(link, 0o600) as file:
            file.write(b"content")
        assert link.is_symlink()
    finally:
        os.close(fd)
    assert (tmp_path / "redirected").read_bytes() == b"content"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may make a link in /dev")
def test_a_link_in_dev_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "redirected").write_bytes(b"")
    link = Path("/dev") / f"volar-test-{os.getpid()}"
    link.symlink_to(tmp_path / "redirected")
    try:
        with download(link, 0o600) as file:
            file.write(b"content")
        assert link.is_symlink()
    finally:
        link.unlink()
    assert (tmp_path / "redirected").read_bytes() == b"content"
