"""Files of a daemon that runs: others come and go while they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def everything_in(top: Path) -> Iterator[Path]:
    """Yields what is in a directory. `Path.rglob` fails when a directory is removed meanwhile (Python 3.11)."""
    for parent, directories, files in os.walk(top):
        for name in (*directories, *files):
            yield Path(parent, name)


def files_in(top: Path) -> Iterator[tuple[Path, bytes]]:
    """Yields the regular files in a directory, and what is in them but holes: an image has a size of gigabytes."""
    for path in everything_in(top):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                yield path, _data_of(path)


def _data_of(path: Path) -> bytes:
    parts = []
    with path.open("rb") as file:
        at = 0
        # Behind the last of the data there is none to seek.
        with suppress(OSError):
            while True:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                parts.append(os.pread(file.fileno(), os.lseek(file.fileno(), at, os.SEEK_HOLE) - at, at))
                at += len(parts[-1])
    return b"".join(parts)


def files_with(top: Path, words: Iterable[bytes]) -> list[Path]:
    """Returns the files that contain one of the words, of files that were there."""
    words = list(words)
    looked_at = 0
    found = []
    for path, data in files_in(top):
        looked_at += 1
        if any(word in data for word in words):
            found.append(path)
    assert looked_at > 1, f"almost nothing is in {top}"
    return found
