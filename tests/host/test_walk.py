"""Paths that are opened step by step lead nowhere out of a directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from volant.host._walk import open_path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "file").write_text("inside")
    (top / "a/b/file").write_text("below")
    (tmp_path / "file").write_text("outside")
    for name, target in {
        "relative": "a/b/file", "up": "../file", "absolute": f"{top}/file", "loop": "loop", "a/back": "../file",
        "directory": "a/b", "process": "/proc/self/fd/0",
    }.items():  # fmt: skip
        (top / name).symlink_to(target)
    return top


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read(path: Path, within: Path, *, links: bool = True) -> str:
    before = descriptors()
    try:
        fd = open_path(path, os.O_RDONLY, within=within, links=links)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    else:
        with os.fdopen(fd) as file:
            return file.read()
    finally:
        # Fewer where the collector closes one of another test meanwhile.
        assert descriptors() <= before


@pytest.mark.parametrize(
    ("path", "followed", "no_links"),
    [
        ("file", "inside", "inside"),
        ("a/b/file", "below", "below"),
        ("a/../file", "inside", "inside"),
        ("relative", "below", "ELOOP"),
        ("a/back", "inside", "ELOOP"),
        ("directory/file", "below", "ELOOP"),
        ("up", "EXDEV", "ELOOP"),
        ("../file", "EXDEV", "EXDEV"),
        ("absolute", "EXDEV", "ELOOP"),
        ("loop", "ELOOP", "ELOOP"),
        ("process", "EXDEV", "ELOOP"),
        ("nothing", "ENOENT", "ENOENT"),
        ("file/below", "ENOTDIR", "ENOTDIR"),
    ],
)
def test_a_path_leads_where_it_may(tree: Path, path: str, followed: str, no_links: str) -> None:
    assert read(tree / path, tree) == followed
    assert read(tree / path, tree, links=False) == no_links


def test_the_directory_itself_and_others_in_it_are_opened(tree: Path) -> None:
    for path, within in ((tree, tree), (tree / "a", tree), (tree / "directory", tree)):
        fd = open_path(path, os.O_PATH | os.O_DIRECTORY, within=within)
        try:
            assert os.path.samestat(os.fstat(fd), path.stat())
        finally:
            os.close(fd)


def test_a_path_has_no_more_directories_than_the_daemon_can_open(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    assert read(deep, tmp_path) == "ENAMETOOLONG"
