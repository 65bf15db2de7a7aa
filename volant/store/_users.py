"""Notes of which daemon uses what in a cache. Daemons that share it remove nothing that another one uses.

    users/<digest>/<name>    contains the state directory of a daemon

A note stays while its daemon does not run, as stopped VMs have disks over what is in the cache. It ends with the state
directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ._files import entries, write_atomically

_MAX_PATH = 4096


class Users:
    """The notes in one directory. Owners are state directories, digests are 64 hexadecimal digits."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def note(self, digest: str, owner: Path) -> None:
        """Writes the note of a daemon. :raises OSError: the disk fails"""
        note = self._note(digest, owner)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, os.fsencode(owner), mode=0o644)

    def is_noted(self, digest: str, owner: Path) -> bool:
        """Returns whether there is a note."""
        return self._note(digest, owner).exists()

    def forget(self, digest: str, owner: Path) -> None:
        """Removes the note. :raises OSError: the disk fails"""
        _drop(self._note(digest, owner))

    def forget_others(self, owner: Path, keep: Collection[str]) -> None:
        """Removes the notes of a daemon, except for some digests. :raises OSError: the disk fails"""
        for digest in entries(self._directory):
            if digest not in keep:
                self.forget(digest, owner)

    def of(self, digest: str) -> list[Path]:
        """Returns the daemons that use the item with a digest. Removes the notes of daemons that no longer exist."""
        found = []
        for name in entries(self._directory / digest):
            note = self._directory / digest / name
            try:
                with note.open("rb") as file:
                    owner = Path(os.fsdecode(file.read(_MAX_PATH)))
            except OSError:
                continue
            if _is_there(owner):
                found.append(owner)
            else:
                with suppress(OSError):
                    _drop(note)
        return sorted(found)

    def _note(self, digest: str, owner: Path) -> Path:
        return self._directory / digest / hashlib.sha256(os.fsencode(owner)).hexdigest()[:16]


def _is_there(owner: Path) -> bool:
    """Returns whether a state directory exists; also if this user may not know."""
    try:
        owner.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _drop(note: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        note.unlink()
    # Fails while there are other notes.
    with suppress(OSError):
        note.parent.rmdir()
