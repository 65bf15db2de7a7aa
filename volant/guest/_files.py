"""`/v1/files/{path}`: read, write and delete the guest's files, streamed.

Everything acts inside the workload's root (`_root.inside`): the kernel resolves every `..` and every symbolic link, and
no path is ever glued to another. So a link in the root filesystem leads where it leads for the workload, and never to
the agent's own files.

**A file that is written is whole or not there.** It is written beside its place under another name, flushed to the
disk, and renamed. A body that breaks off leaves what was there before. What the agent's own death leaves is a file
whose name begins with a dot and contains `.volant-`.

A body is read as fast as the disk takes it, and an answer as fast as the client does; no file is ever in memory.
"""

# ruff: noqa: PTH106, PTH108, PTH116 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import errno
import os
import shutil
import stat
import time

from . import _root
from ._http import LAST_CHUNK, Problem, chunk
from ._memory import memory
from ._query import parse_query, unquote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._http import Request, Stream

TAR = b"application/x-tar"
SILENCE_S = 600.0
"""How long a client may send or take nothing in the middle of a file."""
MODE_HEADER = "Volant-File-Mode"

_PIECE = 256 * 1024
_SPARE_MB = 12
"""What is left of the guest's memory. A file system in RAM would take the last of it, and the agent would be killed."""
_MAX_PATH = 4095
_SHOWN_PATH = 200
_STATUSES = {
    errno.ENOENT: (404, "there is no {}"),
    errno.ENOTDIR: (409, "something on the way to {} is no directory"),
    errno.EISDIR: (409, "{} is a directory"),
    errno.EEXIST: (409, "{} is there already"),
    errno.ENOTEMPTY: (409, "the directory {} is not empty"),
    errno.EACCES: (403, "{} is not permitted"),
    errno.EPERM: (403, "{} is not permitted"),
    errno.EROFS: (409, "{} is on a file system that is read-only"),
    errno.EBUSY: (409, "{} is in use"),
    errno.ETXTBSY: (409, "{} is a program that runs"),
    errno.ENAMETOOLONG: (400, "the path {} is too long"),
    errno.ELOOP: (409, "there are too many symbolic links on the way to {}"),
    errno.ENOSPC: (507, "there is no space left for {}"),
    errno.EDQUOT: (507, "there is no space left for {}"),
    errno.EFBIG: (413, "{} is longer than the file system allows"),
}
_HINTS = {
    errno.ENOTEMPTY: "delete it with ?recursive=true",
    errno.ENOSPC: "files of a guest without a root filesystem are in its memory; delete some, or give the VM more",
}


def handle(stream: Stream, request: Request, encoded: str) -> None:
    """Answer a request for what `encoded` names, beneath the root.

    :raises Problem: 400, 403, 404, 405, 409, 413, 416, 507, and which path; :raises Gone: the client left
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
    """Return an absolute path; :raises Problem: 400, it is malformed."""
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


def show(path: bytes) -> str:
    """Return a path for people."""
    text = path.decode(errors="backslashreplace")
    return text if len(text) <= _SHOWN_PATH else text[:_SHOWN_PATH] + "…"


def problem_of(error: OSError, path: bytes, *, reading: bool) -> Problem:
    """Return what to answer when the system refuses."""
    status, text = _STATUSES.get(error.errno or 0, (500, f"the guest's file system fails at {{}}: {error.strerror}"))
    if reading and error.errno == errno.ENOTDIR:
        status, text = _STATUSES[errno.ENOENT]
    hint = _HINTS.get(error.errno or 0, "")
    return Problem(status, text.format(show(path)), field="path", hint=hint)


Answer = tuple[int, list[tuple[str, str]]]
"""Status and headers of an answer without a body; 0: it has been given already."""


# GET


def _prepare_get(stream: Stream, request: Request, path: bytes) -> Callable[[], Answer]:
    from . import _tar  # inside, nothing can be imported

    def work() -> Answer:
        # What opening does to a device can't be undone, so first a look.
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
        # Those of /proc have a length only when they are read.
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
    """Return begin and end of the one range that is asked for; None: send everything."""
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
        raise Problem(415, "a file is taken as it is, without a Content-Encoding")
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
    before = _look(target)
    if not name or (before is not None and stat.S_ISDIR(before.st_mode)):
        hint = f"a directory is sent as {TAR.decode()}"
        raise Problem(409, f"{show(path)} is a directory", field="path", hint=hint)
    if before is not None and not stat.S_ISREG(before.st_mode):
        raise Problem(409, f"{show(path)} is neither a file nor a directory", field="path")
    directory = _open_parent(parent)
    temporary = beside(name)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            try:
                for data in body:
                    write(fd, data)
                if before is not None:
                    owner = owner or (before.st_uid, before.st_gid)
                    mode = stat.S_IMODE(before.st_mode) if mode is None else mode
                finish(fd, 0o644 if mode is None else mode, owner)
                os.fsync(fd)
                tag = _tag(os.fstat(fd))
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            os.unlink(temporary, dir_fd=directory)
            raise
        os.fsync(directory)
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
    before = _look(target)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if before is not None:
        if not stat.S_ISDIR(before.st_mode):
            raise Problem(409, f"{show(path)} is no directory", field="path")
        directory = os.open(target, flags)
        try:
            unpack(body, directory, owner)
        finally:
            os.close(directory)
        os.sync()
        return 204, []
    parent, name = os.path.split(target)
    above = _open_parent(parent)
    temporary = beside(name)
    try:
        os.mkdir(temporary, 0o755, dir_fd=above)
        try:
            directory = os.open(temporary, flags, dir_fd=above)
            try:
                unpack(body, directory, owner)
            finally:
                os.close(directory)
            os.sync()
            os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
        except BaseException:
            shutil.rmtree(temporary, dir_fd=above)
            raise
        os.fsync(above)
    finally:
        os.close(above)
    return 201, []


def _open_parent(parent: bytes) -> int:
    try:
        return os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        hint = "only the last part of a path is made; a tar makes whole trees"
        raise Problem(404, f"there is no directory {show(parent)}", field="path", hint=hint) from None


def _look(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def beside(name: bytes) -> bytes:
    """Return another name for a file that is to be called `name`."""
    return b"." + name[:200] + b".volant-" + os.urandom(6).hex().encode()


def write(fd: int, data: bytes) -> None:
    """Write all of it; :raises OSError: ENOSPC also when the guest's memory is nearly used up."""
    left = memory()
    if left["total_mb"] and left["available_mb"] < _SPARE_MB:
        raise OSError(errno.ENOSPC, "the guest's memory is nearly used up")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def finish(fd: int, mode: int, owner: tuple[int, int] | None) -> None:
    """Give a new file its owner and its mode, in this order: a change of the owner takes bits from the mode."""
    if owner is not None:
        found = os.fstat(fd)
        if (found.st_uid, found.st_gid) != owner:
            os.fchown(fd, *owner)
    os.fchmod(fd, mode)


def _parse_mode(text: str) -> int:
    if not 1 <= len(text) <= 5 or text.strip("01234567") or int(text, 8) > 0o7777:
        raise Problem(400, "mode is no octal number up to 7777", field="mode")
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
        # The last part of the path may be a link: it is what is deleted, not what it leads to.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif recursive:
            shutil.rmtree(path)
        else:
            os.rmdir(path)
        return 204, []

    return work
