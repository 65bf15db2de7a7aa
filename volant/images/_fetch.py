"""Fetches an artifact: from a file of this host, or by HTTP.

Blocks. The daemon runs it in a process of its own (`python -m volant.images fetch`), and kills that at the deadline.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from volant.host import open_below
from volant.store import check_space, disk_errors

from . import _artifacts
from ._artifacts import CachedArtifact
from ._download import Download, ProgressReporter, Tell
from ._errors import ImageError
from ._origins import PUBLIC, Origins, local_path, shown
from ._part import Part

_READ = 1024 * 1024


def fetch(
    cache_dir: Path,
    url: str,
    digest: str,
    *,
    max_bytes: int,
    origins: Origins = PUBLIC,
    tell: Tell = lambda done, total: None,
) -> CachedArtifact:
    """Returns a verified artifact, from the cache or else from `url`. Of several callers one fetches, the others wait.

    :param origins: from where it may be fetched
    :param tell: called with the bytes that have arrived and their total, 0 if unknown
    :raises ImageError: `artifact_missing`: no such file, or none on this host that may be read and has that digest;
        `artifact_refused`: this origin is not allowed; `artifact_unreachable`: the server fails; `artifact_mismatch`:
        the server has another file; `artifact_too_large`, `cache_full`, `cache_unwritable`, `io_error`
    """
    found = _artifacts.find_artifact(cache_dir, digest)
    if found is not None:
        return found
    with _artifacts.locked_part(cache_dir, digest) as path:
        _artifacts.sweep(cache_dir)
        found = _artifacts.find_artifact(cache_dir, digest) or _artifacts.reverify(cache_dir, digest, shown(url))
        if found is not None:
            return found
        with disk_errors(ImageError):
            with contextlib.closing(Part(path, max_bytes)) as part:
                local = local_path(url)
                if local is not None:
                    _copy(local, part, tell, origins)
                else:
                    Download(url, part, tell, origins).run()
                actual = part.finish()
            if actual != digest:
                if local is not None:
                    raise _no_such_file()
                # Without the actual digest: whoever knows it can get the file from a cache.
                raise ImageError(
                    "artifact_mismatch", f"its SHA-256 is not {digest}", "correct the manifest, or the file"
                )
            return _artifacts.place(cache_dir, path, digest, shown(url))


def _no_such_file() -> ImageError:
    """Returns one error for all files of this host that are missing, unreadable or different."""
    return ImageError(
        "artifact_missing",
        "there is no file that may be read and has this SHA-256",
        "correct the manifest or the file, or upload it with `volar plugins upload`",
    )


def _copy(path: Path, part: Part, tell: Tell, origins: Origins) -> None:
    try:
        if origins.anywhere:
            # O_NONBLOCK: a FIFO must not block.
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        else:
            source = open_below(origins.directories, path)
    except OSError:
        raise _no_such_file() from None
    try:
        figures = os.fstat(source)
        if not stat.S_ISREG(figures.st_mode):
            raise _no_such_file()
        if part.clone(source):
            return
        check_space(part.path, min(figures.st_size, figures.st_blocks * 512), ImageError)
        reporter = ProgressReporter(tell, figures.st_size)
        while data := _read_local(source):
            part.write(data)
            reporter.at(part.size)
    finally:
        os.close(source)


def _read_local(source: int) -> bytes:
    try:
        return os.read(source, _READ)
    except OSError:
        raise _no_such_file() from None
