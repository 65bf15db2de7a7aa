"""Notes of which daemon uses which image or artifact. Daemons that share a cache remove nothing that another one uses.

    users/<digest>/<name>    contains the state directory of a daemon that uses the image or artifact

A note stays while its daemon does not run, as stopped VMs have disks over their root filesystem. It ends with the state
directory.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from . import _store


def note_use(cache_dir: Path, digest: str, owner: Path) -> None:
    """Writes the note of a daemon.

    :param owner: the daemon's state directory
    :raises OSError: the disk fails
    """
    note = _note(cache_dir, digest, owner)
    note.parent.mkdir(parents=True, exist_ok=True)
    _store.write_atomically(note, f"{owner}\n".encode())


def is_noted(cache_dir: Path, digest: str, owner: Path) -> bool:
    """Returns whether there is a note."""
    return _note(cache_dir, digest, owner).exists()


def forget_use(cache_dir: Path, digest: str, owner: Path) -> None:
    """Removes the note. :raises OSError: the disk fails."""
    _drop(_note(cache_dir, digest, owner))


def users(cache_dir: Path, digest: str) -> list[Path]:
    """Returns the state directories of the daemons that use an image or artifact; removes stale notes."""
    found = []
    for note in (cache_dir / "users" / digest).glob("[!.]*"):
        try:
            owner = Path(note.read_text().rstrip("\n"))
        except (OSError, UnicodeDecodeError):
            continue
        if _is_there(owner):
            found.append(owner)
        else:
            with contextlib.suppress(OSError):
                _drop(note)
    return sorted(found)


def _is_there(owner: Path) -> bool:
    """Whether a state directory exists; also if this user may not know."""
    try:
        owner.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _note(cache_dir: Path, digest: str, owner: Path) -> Path:
    return cache_dir / "users" / digest / hashlib.sha256(bytes(owner)).hexdigest()[:16]


def _drop(note: Path) -> None:
    note.unlink(missing_ok=True)
    # Fails while there are other notes.
    with contextlib.suppress(OSError):
        note.parent.rmdir()
