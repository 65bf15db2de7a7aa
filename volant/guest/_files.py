"""`/v1/files/{path}`: reads, writes and deletes the guest's files, streamed.

Everything happens inside the workload's root (`_root.inside`): the kernel resolves every `..` and every symbolic link,
and no path is built from strings. So a link in the root filesystem has the same target as for the workload, and never
leads to the agent's own files.

**A written file is complete or absent.** The agent writes it under another name in the same directory, flushes it to
the disk, and renames it. An interrupted body leaves the old file. If the agent dies, a file remains whose name begins
with a dot and contains `.volant-`.

Bodies are copied in pieces of at most 256 KiB; a whole file is never in memory.
"""

# ruff: noqa: PTH106, PTH108, PTH116 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time

from . import _file_io, _root
from ._checks import parse_query, unquote
from ._file_io import problem_of, show
from ._http import Problem
from ._stream import LAST_CHUNK, chunk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._http import Request
    from ._stream import Stream

TAR = b"application/x-tar"
SILENCE_S = 600.0
"""How long a client may pause in the middle of a file."""
MODE_HEADER = "Volant-File-Mode"

_PIECE = 256 * 1024
_MAX_PATH = 4095

Answer = tuple[int, list[tuple[str, str]]]
"""Status and headers of an answer without a body. Status 0 means that the answer was already sent."""


def handle(stream: Stream, request: Request, encoded: str) -> None:
    """Answers a request for the percent-encoded path `encoded`.

    :raises Problem: 400, 403, 404, 405, 409, 413, 416 or 507, with the path
    :raises Gone: the client disconnected
    """
    path = decode_path(encoded)
    if request.method in ("GET", "HEAD"):
        parse_query(request.query, set())
        work = _prepare_get(stream, request, path)
    elif request.method == "PUT":
        work = _prepare_put(stream, request, path)
    elif request.method == "DELETE":
        work = _prepare_delete(request, path)
    else:
        allowed = [("Allow", "GET, HEAD, PUT, DELETE")]
        raise Problem(405, f"files can't be asked for with {request.method}", headers=allowed)
    try:
        status, headers = _root.inside(work)
    except OSError as error:
        raise problem_of(error, path, reading=request.method != "PUT") from None
    if status:
        stream.start(status, headers)


def decode_path(encoded: str) -> bytes:
    """Returns an absolute path. :raises Problem: 400, the path is malformed."""
    if "%2f" in encoded.lower():
        raise Problem(400, "the path has a / that is percent-encoded", field="path")
    data = unquote(encoded, "the path")
    parts = [part for part in data.split(b"/") if part]
    if b"." in parts or b".." in parts:
        raise Problem(400, "the path has a part . or ..", field="path", hint="clients resolve these before they ask")
    path = b"/" + b"/".join(parts)
    if len(path) > _MAX_PATH:
        raise Problem(400, f"the path is longer than {_MAX_PATH} bytes", field="path")
    return path


# GET


def _prepare_get(stream: Stream, request: Request, path: bytes) -> Callable[[], Answer]:
    from . import _tar  # nothing can be imported inside the root

    def work() -> Answer:
        # Not open first: opening a device may have effects.
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            fields = [("Content-Type", TAR.decode()), (MODE_HEADER, _mode_text(found))]
            stream.start(200, fields, chunked=True)
            if request.method == "GET":
                _tar.pack(path, lambda data: stream.send(chunk(data), SILENCE_S))
                stream.send(LAST_CHUNK)
            return 0, []
        if not stat.S_ISREG(found.st_mode):
            raise Problem(409, f"{show(path)} is neither a file nor a directory", field="path")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            return _send_file(stream, request, fd)
        finally:
            os.close(fd)

    return work


def _send_file(stream: Stream, request: Request, fd: int) -> Answer:
    found = os.fstat(fd)
    tag = _tag(found)
    fields = [
        ("ETag", tag),
        ("Last-Modified", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(found.st_mtime))),
        (MODE_HEADER, _mode_text(found)),
    ]
    if request.header(b"if-none-match").decode("latin-1") in (tag, "*"):
        return 304, fields
    fields.append(("Content-Type", "application/octet-stream"))
    if found.st_size == 0:
        # Files of /proc have no length until they are read.
        return _send_until_end(stream, request, fd, fields)
    fields.append(("Accept-Ranges", "bytes"))
    begin, end = 0, found.st_size
    status = 200
    if request.method == "GET" and request.header(b"if-range").decode("latin-1") in ("", tag):
        wanted = _range(request.header(b"range"), found.st_size)
        if wanted is not None:
            begin, end = wanted
            if begin >= end:
                unsatisfied = [("Content-Range", f"bytes */{found.st_size}")]
                raise Problem(416, f"the file has {found.st_size} bytes", field="Range", headers=unsatisfied)
            status = 206
            fields.append(("Content-Range", f"bytes {begin}-{end - 1}/{found.st_size}"))
    stream.start(status, [*fields, ("Content-Length", str(end - begin))])
    if request.method == "HEAD":
        return 0, []
    os.lseek(fd, begin, os.SEEK_SET)
    left = end - begin
    while left:
        data = os.read(fd, min(_PIECE, left))
        if not data:
            raise OSError(errno.EIO, "the file has become shorter")
        stream.send(data, SILENCE_S)
        left -= len(data)
    return 0, []


def _send_until_end(stream: Stream, request: Request, fd: int, fields: list[tuple[str, str]]) -> Answer:
    stream.start(200, fields, chunked=True)
    if request.method == "GET":
        while data := os.read(fd, _PIECE):
            stream.send(chunk(data), SILENCE_S)
        stream.send(LAST_CHUNK)
    return 0, []


def _tag(found: os.stat_result) -> str:
    return f'"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'


def _mode_text(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


def _range(value: bytes, size: int) -> tuple[int, int] | None:
    """Returns begin and end of the one requested range; None for the whole file."""
    unit, _, text = value.partition(b"=")
    first, dash, last = text.strip().partition(b"-")
    if unit.strip().lower() != b"bytes" or not dash or len(text) > 40:
        return None
    if first.isdigit() and (last.isdigit() or not last):
        if last and int(last) < int(first):
            return None
        return int(first), min(int(last) + 1, size) if last else size
    if not first and last.isdigit():
        return max(0, size - int(last)) if int(last) else size, size
    return None


# PUT


def _prepare_put(stream: Stream, request: Request, path: bytes) -> Callable[[], Answer]:
    query = parse_query(request.query, {"mode", "user"})
    mode = _parse_mode(query["mode"]) if "mode" in query else None
    owner = _parse_owner(query["user"]) if "user" in query else None
    if request.header(b"content-encoding"):
        raise Problem(415, "a file is stored unchanged; send it without Content-Encoding")
    is_tar = request.header(b"content-type").partition(b";")[0].strip().lower() == TAR
    if is_tar and mode is not None:
        raise Problem(400, "mode is for a file; a tar says the modes itself", field="mode")
    body = stream.pieces(request, SILENCE_S)
    if not is_tar:
        return lambda: _put_file(body, path, mode, owner)
    from . import _tar

    return lambda: _put_directory(_tar.unpack, body, path, owner)


def _put_file(body: Iterator[bytes], path: bytes, mode: int | None, owner: tuple[int, int] | None) -> Answer:
    target = os.path.realpath(path)
    parent, name = os.path.split(target)
    before = _stat(target)
    if not name or (before is not None and stat.S_ISDIR(before.st_mode)):
        hint = f"a directory is sent as {TAR.decode()}"
        raise Problem(409, f"{show(path)} is a directory", field="path", hint=hint)
    if before is not None and not stat.S_ISREG(before.st_mode):
        raise Problem(409, f"{show(path)} is neither a file nor a directory", field="path")
    directory = _open_parent(parent)
    temporary = _file_io.temporary_name(name)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        with _renaming(temporary, name, directory, os.unlink):
            try:
                for data in body:
                    _file_io.write(fd, data)
                if before is not None:
                    owner = owner or (before.st_uid, before.st_gid)
                    mode = stat.S_IMODE(before.st_mode) if mode is None else mode
                _file_io.set_owner_and_mode(fd, 0o644 if mode is None else mode, owner)
                os.fsync(fd)
                tag = _tag(os.fstat(fd))
            finally:
                os.close(fd)
    finally:
        os.close(directory)
    return (201 if before is None else 204), [("ETag", tag)]


def _put_directory(
    unpack: Callable[[Iterator[bytes], int, tuple[int, int] | None], None],
    body: Iterator[bytes],
    path: bytes,
    owner: tuple[int, int] | None,
) -> Answer:
    target = os.path.realpath(path)
    before = _stat(target)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if before is not None:
        if not stat.S_ISDIR(before.st_mode):
            raise Problem(409, f"{show(path)} is not a directory", field="path")
        directory = os.open(target, flags)
        try:
            unpack(body, directory, owner)
        finally:
            os.close(directory)
        os.sync()
        return 204, []
    parent, name = os.path.split(target)
    above = _open_parent(parent)
    temporary = _file_io.temporary_name(name)
    try:
        os.mkdir(temporary, 0o755, dir_fd=above)
        with _renaming(temporary, name, above, shutil.rmtree):
            directory = os.open(temporary, flags, dir_fd=above)
            try:
                unpack(body, directory, owner)
            finally:
                os.close(directory)
            os.sync()
    finally:
        os.close(above)
    return 201, []


@contextlib.contextmanager
def _renaming(temporary: bytes, name: bytes, directory: int, remove: Callable[..., None]) -> Iterator[None]:
    """Renames the block's file durably, or removes it if the block fails."""
    try:
        yield
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        remove(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


def _open_parent(parent: bytes) -> int:
    try:
        return os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        hint = "only the last part of a path is made; a tar makes whole trees"
        raise Problem(404, f"there is no directory {show(parent)}", field="path", hint=hint) from None


def _stat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _parse_mode(text: str) -> int:
    if not 1 <= len(text) <= 5 or text.strip("01234567") or int(text, 8) > 0o7777:
        raise Problem(400, "mode is not an octal number up to 7777", field="mode")
    return int(text, 8)


def _parse_owner(text: str) -> tuple[int, int]:
    try:
        found = _root.identity(text)
    except _root.NoSuchUser:
        raise Problem(400, f"there is no user {text[:80]}", field="user") from None
    return found["user"], found["group"]


# DELETE


def _prepare_delete(request: Request, path: bytes) -> Callable[[], Answer]:
    query = parse_query(request.query, {"recursive"})
    if query.get("recursive", "false") not in ("true", "false"):
        raise Problem(400, "recursive is neither true nor false", field="recursive")
    recursive = query.get("recursive") == "true"
    if path == b"/":
        raise Problem(409, "the root can't be deleted", field="path")

    def work() -> Answer:
        # A link is deleted itself, not its target.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif recursive:
            shutil.rmtree(path)
        else:
            os.rmdir(path)
        return 204, []

    return work
