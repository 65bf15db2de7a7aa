"""Copies the VM's files at a path into the empty volume that is mounted there, like Docker.

An interrupted copy must not be mistaken for content, so a marker is in the volume during the copy. If the marker
exists, the volume only contains an unfinished copy, which is removed and repeated.
"""

# ruff: noqa: PTH101, PTH102, PTH106, PTH108, PTH114, PTH115, PTH116, PTH208, PTH211 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import errno
import os
import stat

MARKER = ".volant-copy-unfinished"
_LOST = "lost+found"
_PIECE = 2**30


def is_unfinished(volume: str) -> bool:
    """Returns whether a copy into a volume was interrupted."""
    return os.path.lexists(f"{volume}/{MARKER}")


def copy_up(source: str | None, volume: str) -> None:
    """Copies a directory into a volume if that is empty, with owners, modes, times, links and extended attributes.

    :param source: a path of the files that the volume hides; None to only empty the volume
    :param volume: the mount point of the volume; like `source`, a path that does not end in a link
    :raises OSError: the volume is too small, or a disk fails
    """
    marker = f"{volume}/{MARKER}"
    if is_unfinished(volume):
        _clear(volume)
    elif not _make_empty(volume):
        return
    if source is not None:
        found = os.stat(source)
        if os.listdir(source):
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            _sync(volume)
            _copy_tree(source, volume)
        _copy_attributes(source, volume, found)
    if is_unfinished(volume):
        os.sync()
        os.unlink(marker)
        _sync(volume)


def _make_empty(volume: str) -> bool:
    """Returns whether a volume has no content. Removes the directory that `mke2fs` creates in it: programs such as
    databases need an empty directory."""
    names = os.listdir(volume)
    if names != [_LOST]:
        return not names
    try:
        os.rmdir(f"{volume}/{_LOST}")
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _clear(volume: str) -> None:
    """Removes everything except the marker."""
    for path, directories, files in os.walk(volume, topdown=False):
        for name in files + directories:
            full = f"{path}/{name}"
            if name in directories and not os.path.islink(full):
                os.rmdir(full)
            elif full != f"{volume}/{MARKER}":
                os.unlink(full)


def _copy_tree(source: str, target: str) -> None:
    """Copies the content of a directory, without filesystems that are mounted in it. Follows no link."""
    device = os.stat(source).st_dev
    links: dict[tuple[int, int], str] = {}
    directories: list[tuple[str, os.stat_result]] = []
    left = [""]
    while left:
        inside = left.pop()
        with os.scandir(source + inside) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}"
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    os.mkdir(target + path, 0o700)
                    directories.append((path, found))
                    if found.st_dev == device:
                        left.append(path)
                elif (found.st_dev, found.st_ino) in links:
                    os.link(target + links[found.st_dev, found.st_ino], target + path, follow_symlinks=False)
                else:
                    _copy_node(source + path, target + path, found)
                    _copy_attributes(source + path, target + path, found)
                    if found.st_nlink > 1:
                        links[found.st_dev, found.st_ino] = path
    # Last, as a file that is made in a directory changes its time.
    for path, found in directories:
        _copy_attributes(source + path, target + path, found)


def _copy_node(source: str, target: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(found.st_mode):
        _copy_data(source, target)
    else:
        os.mknod(target, stat.S_IFMT(found.st_mode) | 0o600, found.st_rdev)


def _copy_data(source: str, target: str) -> None:
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while os.sendfile(writing, reading, None, _PIECE):
                pass
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_attributes(source: str, target: str, found: os.stat_result) -> None:
    # In this order: a new owner takes set-user-id bits and capabilities away.
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    is_link = stat.S_ISLNK(found.st_mode)
    if not is_link:
        os.chmod(target, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source, follow_symlinks=not is_link):
        _copy_xattr(source, target, name, follow=not is_link)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _copy_xattr(source: str, target: str, name: str, *, follow: bool) -> None:
    try:
        os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=follow), follow_symlinks=follow)
    except OSError as error:
        # The filesystem of a volume may know fewer of them.
        if error.errno != errno.ENOTSUP:
            raise


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
