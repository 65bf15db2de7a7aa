"""Directories as tar, in both directions, as streams.

The format code is the standard library's, but not the extraction: `TarFile.extract` works on paths, and its filters
check paths before it opens them. Here each part of a member's path is opened from the directory before it, and never
through a symbolic link. So a member can't leave the directory, whatever links it contains, even if they change at the
same time.
"""

# ruff: noqa: PTH115, PTH116 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import errno
import os
import stat
import tarfile
import zlib

from . import _file_io
from ._file_io import problem_of, show
from ._http import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

del zlib  # tarfile imports it when something fails, and nothing can be imported inside a root

MAX_MEMBERS = 1_000_000
_MAX_DEPTH = 128
_MAX_HEADER = 1024 * 1024
_PIECE = 64 * 1024
_BLOCK = 512


# From a directory to a tar


def pack(top: bytes, send: Callable[[bytes], None], owner: tuple[int, int] | None = None) -> None:
    """Sends the tar of a directory in pieces: files, directories and links of one file system.

    :param owner: user and group of all members, by number; None for those on the disk
    :raises OSError: something can't be read, or a file became shorter
    """
    out = _Buffer(send, owner)
    device = os.stat(top).st_dev
    out.begin(b".", os.stat(top))
    # Depth first, with one open directory per level: memory depends on the depth of the tree, not on its width.
    levels = [(b"", os.scandir(top))]
    try:
        while levels:
            prefix, entries = levels[-1]
            entry = next(entries, None)
            if entry is None:
                entries.close()
                levels.pop()
                continue
            name = prefix + entry.name
            try:
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    _pack_file(entry.path, name, out)
                elif stat.S_ISLNK(found.st_mode):
                    out.begin(name, found, os.readlink(entry.path))
                elif stat.S_ISDIR(found.st_mode):
                    out.begin(name, found)
                    if found.st_dev == device:
                        if len(levels) > _MAX_DEPTH:
                            raise OSError(errno.ELOOP, "the tree is too deep")
                        levels.append((name + b"/", os.scandir(entry.path)))
            except FileNotFoundError:
                continue  # deleted meanwhile
    finally:
        for _, entries in levels:
            entries.close()
    out.add(bytes(2 * _BLOCK))
    out.flush()


def _pack_file(path: bytes, name: bytes, out: _Buffer) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    fd = os.open(path, flags)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return
        out.begin(name, found)
        left = found.st_size
        while left:
            data = os.read(fd, min(_PIECE, left))
            if not data:
                raise OSError(errno.EIO, "a file has become shorter")
            out.add(data)
            left -= len(data)
        out.add(bytes(-found.st_size % _BLOCK))
    finally:
        os.close(fd)


class _Buffer:
    """Joins headers and contents into pieces of 64 KiB."""

    def __init__(self, send: Callable[[bytes], None], owner: tuple[int, int] | None) -> None:
        self._send = send
        self._owner = owner
        self._data = bytearray()

    def begin(self, name: bytes, found: os.stat_result, target: bytes = b"") -> None:
        """Adds the header of a member."""
        member = tarfile.TarInfo(os.fsdecode(name))
        member.mode = stat.S_IMODE(found.st_mode)
        member.uid, member.gid = self._owner or (found.st_uid, found.st_gid)
        member.mtime = int(found.st_mtime)
        if stat.S_ISDIR(found.st_mode):
            member.type = tarfile.DIRTYPE
        elif target:
            member.type = tarfile.SYMTYPE
            member.linkname = os.fsdecode(target)
        else:
            member.size = found.st_size
        self.add(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= _PIECE:
            self.flush()

    def flush(self) -> None:
        if self._data:
            self._send(bytes(self._data))
            self._data.clear()


# From a tar to a directory


class _Malformed(Exception):
    """The body is not a tar. It is not a `HeaderError`, which tarfile treats as the end of the archive."""


class _Member(tarfile.TarInfo):
    """A header. A malformed one is always an error; `tarfile` ignores all but the first."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise _Malformed(str(error)) from None
        if member.size < 0:
            raise _Malformed("a member is shorter than nothing")
        return member


class _Source:
    """The file that tarfile reads from: forwards only, and at most 1 MiB at once, whatever a header declares."""

    def __init__(self, body: Iterator[bytes]) -> None:
        self._body = body
        self._rest = b""
        self._position = 0

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or fewer at the end."""
        if not 0 <= size <= _MAX_HEADER:
            raise _Malformed("a header is too long")
        out = bytearray()
        while len(out) < size:
            if not self._rest:
                self._rest = next(self._body, b"")
                if not self._rest:
                    break
            wanted = size - len(out)
            out += self._rest[:wanted]
            self._rest = self._rest[wanted:]
        self._position += len(out)
        return bytes(out)

    def seek(self, position: int) -> None:
        """Skips to `position`, or to the end of the body."""
        if position < self._position:
            raise _Malformed("it is not in order")
        while self._position < position and self.read(min(position - self._position, _PIECE)):
            pass

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True


def unpack(body: Iterator[bytes], directory: int, owner: tuple[int, int] | None, *, modes: int = 0o7777) -> None:
    """Unpacks a tar into an open directory: files, directories, symbolic and hard links. Reads all of `body`.

    :param owner: user and group of all files, by number; None for those in the tar
    :param modes: mask for the modes of files and directories
    :raises Problem: 400, not a tar, or a member of another type; 409, something is in the way; 413; 507
    """
    tree = _Tree(directory, owner, modes)
    try:
        archive = tarfile.TarFile(
            fileobj=_Source(body),  # type: ignore[arg-type]  # it writes nothing, and closes nothing
            tarinfo=_Member,
            encoding="utf-8",
            errors="surrogateescape",
        )
        count = 0
        while (member := archive.next()) is not None:
            del archive.members[:]  # type: ignore[attr-defined]  # it would keep them all
            count += 1
            if count > MAX_MEMBERS:
                raise Problem(413, f"the tar has more than {MAX_MEMBERS} members")
            tree.add(member, archive)
    except (tarfile.TarError, _Malformed, EOFError, ValueError, OverflowError) as error:
        raise Problem(
            400, f"the body is not a tar: {error}", hint="compressed ones have to be unpacked first"
        ) from None
    finally:
        tree.close()
    for _ in body:
        pass


class _Tree:
    """The directory to unpack into."""

    def __init__(self, top: int, owner: tuple[int, int] | None, modes: int) -> None:
        self._top = top
        self._owner = owner
        self._modes = modes
        # Kept open, as members of one directory mostly follow each other.
        self._open: tuple[tuple[bytes, ...], int] = ((), os.dup(top))

    def close(self) -> None:
        os.close(self._open[1])

    def add(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Unpacks one member. :raises Problem: it can't be unpacked; the text names it."""
        parts = _parts(member.name, member.name)
        try:
            if member.isdir():
                self._add_directory(member, parts)
                return
            if not parts:
                raise Problem(400, "a member of the tar that is not a directory has no name")
            where = self._directory(parts[:-1])
            temporary = _file_io.temporary_name(parts[-1])
            try:
                self._make(member, archive, where, temporary)
                os.rename(temporary, parts[-1], src_dir_fd=where, dst_dir_fd=where)
            finally:
                # Also after success: a rename between two hard links of one file leaves both.
                _unlink(temporary, where)
        except OSError as error:
            raise problem_of(error, os.fsencode(member.name), reading=False) from None

    def _make(self, member: tarfile.TarInfo, archive: tarfile.TarFile, where: int, name: bytes) -> None:
        if member.isreg():
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=where)
            try:
                content = archive.extractfile(member)
                assert content is not None
                while data := content.read(_PIECE):
                    _file_io.write(fd, data)
                _file_io.set_owner_and_mode(fd, member.mode & self._modes, self._owner_of(member))
                os.utime(fd, (member.mtime, member.mtime))
            finally:
                os.close(fd)
        elif member.issym():
            os.symlink(os.fsencode(member.linkname), name, dir_fd=where)
            if (owner := self._owner_of(member)) != (os.geteuid(), os.getegid()):
                os.chown(name, *owner, dir_fd=where, follow_symlinks=False)
        elif member.islnk():
            source = _parts(member.linkname, member.name)
            if not source:
                raise Problem(400, f"{show(os.fsencode(member.name))} in the tar is a hard link to a directory")
            begin = self._walk(source[:-1], make=False)
            try:
                os.link(source[-1], name, src_dir_fd=begin, dst_dir_fd=where, follow_symlinks=False)
            finally:
                os.close(begin)
        else:
            raise Problem(400, f"{show(os.fsencode(member.name))} in the tar is neither a file, a directory nor a link")

    def _add_directory(self, member: tarfile.TarInfo, parts: tuple[bytes, ...]) -> None:
        _file_io.set_owner_and_mode(self._directory(parts), member.mode & self._modes, self._owner_of(member))

    def _owner_of(self, member: tarfile.TarInfo) -> tuple[int, int]:
        return self._owner or (member.uid, member.gid)

    def _directory(self, parts: tuple[bytes, ...]) -> int:
        if self._open[0] != parts:
            fd = self._walk(parts, make=True)
            os.close(self._open[1])
            self._open = parts, fd
        return self._open[1]

    def _walk(self, parts: tuple[bytes, ...], *, make: bool) -> int:
        """Opens a directory beneath the top without following links; returns its descriptor."""
        fd = os.dup(self._top)
        for number, part in enumerate(parts):
            below = fd
            try:
                if make:
                    try:
                        os.mkdir(part, 0o755, dir_fd=below)
                    except FileExistsError:
                        pass
                fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=below)
            except NotADirectoryError:
                text = f"{show(b'/'.join(parts[: number + 1]))} is in the way: it is not a directory, or a link to one"
                raise Problem(409, text, field="path") from None
            finally:
                os.close(below)
        return fd


def _parts(name: str, member: str) -> tuple[bytes, ...]:
    """Returns the parts of a member's path. :raises Problem: 400, the path has `..` or NUL, or is too deep."""
    data = os.fsencode(name)
    parts = tuple(part for part in data.split(b"/") if part not in (b"", b"."))
    if b".." in parts or b"\0" in data or len(parts) > _MAX_DEPTH:
        raise Problem(400, f"{show(os.fsencode(member))} in the tar has a path that leads out of it, or is too deep")
    return parts


def _unlink(name: bytes, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
