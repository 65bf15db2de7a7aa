"""Converts layers to read-only EROFS file systems, and joins those of an image.

Runs in a separate process (`__main__.py`), because it decompresses and hashes for seconds. Everything is streamed, so
memory use does not depend on the size of a layer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import resource
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec
import zstandard

from volant.store import check_space, disk_errors

from ._erofs import opened
from ._errors import OciError
from ._join import correction
from ._manifest import MAX_LAYER_BYTES
from ._tar import END, TarCheck

PROGRAM = "mkfs.erofs"
PROGRAM_HINT = "on Debian: `sudo apt install erofs-utils`"
_PIECE = 1024 * 1024
_COMPRESSED_PIECE = 64 * 1024
_MAX_RATIO = 1000
"""Maximum compression ratio. zlib compresses zeros 1030-fold, but layers have other content too."""
_RATIO_FREE = 64 * 1024 * 1024
_MAX_WINDOW = 128 * 1024 * 1024
"""Maximum window for decompression, for `zstd --long`."""
PROGRAM_MEMORY = 4 * 1024**3
"""Maximum memory of `mkfs.erofs`, which has all entries of a layer in memory."""
_CHECK_SPACE_BYTES = 32 * 1024 * 1024
_FULL_BYTES = 1024 * 1024
"""A file system with less free space is full: a program that failed may have removed its last data."""
_MAX_COMPLAINT = 300
_PIECES_AHEAD = 4
_JOIN_S = 0.01
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

_SAME_BYTES = ("-U", "clear", "-T0", "--mkfs-time", "--quiet")
"""Options for reproducible files: no UUID and no creation time; files keep their own times."""
_LAYER_OPTIONS = ("-Enoinline_data", "--tar=f", "--aufs", *_SAME_BYTES)
_JOIN_OPTIONS = ("--aufs", *_SAME_BYTES)


class LayerJob(msgspec.Struct, frozen=True):
    """A layer to convert."""

    blob: str
    """The path of the layer as stored in a registry."""
    digest: str
    """The digest of the blob."""
    size: int
    """The size of the blob, in bytes."""
    diff_id: str
    """The digest of the uncompressed layer."""
    target: str
    """The path of the file to write, which may exist if it is empty."""
    done: str = ""
    """The path of a file that is created when the target is complete."""


def convert(job: LayerJob) -> None:
    """Writes the file of a layer; it is on the disk when this returns.

    :raises OciError: `image_mismatch`, `image_invalid`, `image_too_large`, `cache_full`, `io_error`, `program_missing`
    """
    target = Path(job.target)
    with Path(job.blob).open("rb", buffering=0) as blob:
        actual = os.fstat(blob.fileno()).st_size
        if actual != job.size:
            raise _mismatch(f"layer {job.digest} has {actual} bytes, the manifest says {job.size}")
        compressed = _Hashed(blob)
        plain = hashlib.sha256()
        check = TarCheck()
        with _Program(_LAYER_OPTIONS, target) as program:
            for piece in ahead(_bounded(decompressed(compressed), job)):
                plain.update(piece)
                if not check.ended:
                    program.write(check.feed(piece))
            compressed.drain()
            if (found := f"sha256:{compressed.hash.hexdigest()}") != job.digest:
                raise _mismatch(f"the digest of layer {job.digest} is {found}")
            if (found := f"sha256:{plain.hexdigest()}") != job.diff_id:
                raise _mismatch(f"the diff ID of layer {job.digest} is {found}, the configuration says {job.diff_id}")
            program.write(check.finish())
    _finish(target)
    if job.done:
        Path(job.done).touch()


def join(layers: Sequence[str], correcting: Path, target: Path) -> None:
    """Creates the metadata that combine the files of layers, lowest first, to one file system.

    :param correcting: the file of one more layer above them: `_join.py`
    :raises OciError: see `convert`
    """
    with contextlib.ExitStack() as stack:
        entries = correction([stack.enter_context(opened(Path(layer))) for layer in layers])
    with _Program(_LAYER_OPTIONS, correcting) as program:
        program.write(entries + END)
    _finish(correcting)
    with _Program(_JOIN_OPTIONS, target, *layers, str(correcting)):
        pass
    _finish(target)


def decompressed(stream: _Hashed) -> Iterator[bytes]:
    """Yields the pieces of a layer. The first bytes determine the compression, as media types are often wrong."""
    first = stream.read(_COMPRESSED_PIECE)
    try:
        if first.startswith(_GZIP):
            yield from _gunzip(first, stream)
        elif first.startswith(_ZSTD):
            yield from _unzstd(first, stream)
        else:
            while first:
                yield first
                first = stream.read(_PIECE)
    except (zlib.error, zstandard.ZstdError) as error:
        raise OciError("image_invalid", f"the layer can't be decompressed: {error}", "push the image again") from error


def _gunzip(data: bytes, stream: _Hashed) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    while data:
        if piece := member.decompress(data, _PIECE):
            yield piece
        if not member.eof:
            # Data that it holds back when a piece is full comes with the next call.
            data = member.unconsumed_tail or stream.read(_COMPRESSED_PIECE)
            continue
        # Layers may consist of many members, or be padded with zeros.
        data = member.unused_data.lstrip(b"\0")
        while not data and (more := stream.read(_COMPRESSED_PIECE)):
            data = more.lstrip(b"\0")
        if not data:
            return
        member = zlib.decompressobj(wbits=31)
    while piece := member.decompress(b"", _PIECE):
        yield piece
    if not member.eof:
        raise zlib.error("it is cut off")


def _unzstd(data: bytes, stream: _Hashed) -> Iterator[bytes]:
    class Source:
        """Reads the first bytes again, then the rest."""

        def __init__(self) -> None:
            self._first = data

        def read(self, size: int) -> bytes:
            first, self._first = self._first, b""
            return first or stream.read(size)

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decompressor.stream_reader(Source(), read_across_frames=True) as reader:  # type: ignore[arg-type]
        while piece := reader.read(_PIECE):
            yield piece


def ahead(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same pieces, some of them created by a thread in advance. So zlib and hashes run in parallel."""
    made: queue.Queue[bytes | BaseException | None] = queue.Queue(_PIECES_AHEAD)
    is_over = threading.Event()

    def make() -> None:
        last: BaseException | None = None
        try:
            for piece in pieces:
                made.put(piece)
                if is_over.is_set():
                    return
        except BaseException as error:
            last = error
        made.put(last)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while isinstance(piece := made.get(), bytes):
            yield piece
        if piece is not None:
            raise piece
    finally:
        is_over.set()
        while thread.is_alive():
            # It may wait for room.
            with contextlib.suppress(queue.Empty):
                made.get(timeout=_JOIN_S)
        thread.join()


def _bounded(pieces: Iterator[bytes], job: LayerJob) -> Iterator[bytes]:
    limit = min(MAX_LAYER_BYTES, job.size * _MAX_RATIO + _RATIO_FREE)
    size, checked = 0, -_CHECK_SPACE_BYTES
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise OciError(
                "image_too_large", f"layer {job.digest} has more than {limit // 2**20} MiB uncompressed",
                "use an image with smaller layers",
            )  # fmt: skip
        if size - checked >= _CHECK_SPACE_BYTES:
            checked = size
            check_space(Path(job.blob).parent, 0, OciError)
        yield piece


def _finish(target: Path) -> None:
    with disk_errors(OciError), target.open("rb") as file:
        os.fsync(file.fileno())


class _Hashed:
    """A file that is hashed during reading."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data

    def drain(self) -> None:
        while self.read(_PIECE):
            pass


class _Program:
    """Runs `mkfs.erofs` for the block. An error in the block ends it; otherwise its own error is raised."""

    def __init__(self, options: Sequence[str], target: Path, *layers: str) -> None:
        self._target = target
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [PROGRAM, *options, str(target), *layers], stdin=subprocess.PIPE, stdout=self._log, stderr=self._log
            )
        except FileNotFoundError:
            self._log.close()
            raise OciError("program_missing", f"{PROGRAM} is not installed", PROGRAM_HINT) from None
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        with contextlib.suppress(OSError):
            # Fewer changes between the two processes.
            fcntl.fcntl(self._stdin, fcntl.F_SETPIPE_SZ, _PIECE)
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, (PROGRAM_MEMORY, PROGRAM_MEMORY))

    def write(self, data: bytes) -> None:
        try:
            self._stdin.write(data)
        except BrokenPipeError:
            raise self._failure() from None

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._log:
            if kind is not None:
                self._process.kill()
                _quietly(self._stdin.close)
                self._process.wait()
                return
            _quietly(self._stdin.close)
            if self._process.wait() != 0:
                raise self._failure()

    def _failure(self) -> OciError:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read(64 * 1024).decode(errors="replace").strip().splitlines()
        said = (lines[0] if lines else f"status {status}")[:_MAX_COMPLAINT]
        # Often it says something else: a write that failed confuses it.
        figures = os.statvfs(self._target.parent)
        if "No space left" in said or "quota" in said or figures.f_bavail * figures.f_frsize < _FULL_BYTES:
            return OciError("cache_full", "the cache is full", "make room on its file system")
        return OciError("image_invalid", f"{PROGRAM} can't convert the layer: {said}", "push the image again")


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except BrokenPipeError:
        pass


def _mismatch(what: str) -> OciError:
    return OciError("image_mismatch", what, "fetch it again; if it stays, the registry or a mirror has a damaged copy")
