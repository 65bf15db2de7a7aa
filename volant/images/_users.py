"""Who uses what lies in a cache. Several daemons may share one, and none removes what another's VMs boot from.

    users/<digest>/<name>    the state directory of a daemon that uses the image, or the artifact, with that digest

It stays while that daemon does not run: a VM that is stopped has a disk that means nothing without its root filesystem.
Who has no state directory any more uses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from . import _store


def note_use(cache_dir: Path, digest: str, owner: Path) -> None:
    """Let no other daemon remove it from now on. `owner`: the daemon's state directory. Raises OSError."""
    note = _note(cache_dir, digest, owner)
    note.parent.mkdir(parents=True, exist_ok=True)
    _store.write_atomically(note, f"{owner}\n".encode())


def is_noted(cache_dir: Path, digest: str, owner: Path) -> bool:
    """Whether that has been done before."""
    return _note(cache_dir, digest, owner).exists()


def forget_use(cache_dir: Path, digest: str, owner: Path) -> None:
    """Leave it to the others. Raises OSError."""
    _drop(_note(cache_dir, digest, owner))


def users(cache_dir: Path, digest: str) -> list[Path]:
    """The state directories of the daemons that use it."""
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
    """Whether there is that directory, or who may not look there can't say."""
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
    # Others' are still there, or somebody makes one.
    with contextlib.suppress(OSError):
        note.parent.rmdir()
