"""Files and directories in a guest."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import quote

import msgspec

from ._actions import Pieces
from ._calls import read_whole
from ._errors import ClientProblem, UnexpectedAnswer
from ._http import Http, chunks_of
from ._transport import Query, Request

TAR = "application/x-tar"
SILENCE_S = 630.0
"""Maximum wait for a piece. The agent allows ten minutes, in both directions."""
MAX_READ = 64 * 1024 * 1024
_MODE = "volant-file-mode"


class FileInfo(msgspec.Struct, frozen=True):
    """A file or a directory in a guest."""

    is_directory: bool
    mode: int
    size: int | None
    """The size in bytes; None for a directory, or a file whose size is unknown before it is read, such as in
    `/proc`."""
    etag: str | None
    """A value that changes when the file changes."""


class FileReader:
    """A file, or a directory as tar: `async for` yields it in pieces, once."""

    def __init__(self, info: FileInfo, path: str, chunks: AsyncIterator[bytes]) -> None:
        self.info = info
        self._path = path
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def read(self, limit: int = MAX_READ) -> bytes:
        """Returns the rest. :raises UnexpectedAnswer: it is longer than `limit` bytes."""
        return await read_whole(self._chunks, limit, self._path)


def file_url(base: str, path: str) -> str:
    """Returns the URL path of a file. :raises ClientProblem: 400, `path` is not absolute."""
    if not path.startswith("/"):
        raise ClientProblem(400, "invalid-request", f"{path!r} is no absolute path", field="path")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ClientProblem(400, "invalid-request", f"{path!r} has a part ..", field="path")
    encoded = "/".join(quote(part.encode("utf-8", "surrogateescape"), safe="") for part in parts)
    return f"{base}/agent/v1/files/{encoded}"


async def stat_file(http: Http, url: str) -> FileInfo:
    """Returns the file or directory at a URL."""
    try:
        response = await http.send(Request("HEAD", url))
    except ClientProblem as problem:
        if problem.code != "unexpected-answer":
            raise
        # The answer to HEAD has no body that explains the error, so ask with GET.
        async with http.stream(Request("GET", url, headers={"Range": "bytes=0-0"}), read_s=SILENCE_S) as answer:
            return _info(answer.headers)
    return _info(response.headers)


@asynccontextmanager
async def open_file(http: Http, url: str, path: str, *, directory: bool, start: int = 0) -> AsyncIterator[FileReader]:
    """Opens a file, or a directory as tar, which the block reads."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    async with http.stream(Request("GET", url, headers=headers), read_s=SILENCE_S) as response:
        info = _info(response.headers)
        if info.is_directory != directory:
            what, use = ("a directory", "get_tar") if info.is_directory else ("no directory", "read_file")
            raise ClientProblem(409, "conflict", f"{path} is {what}", field="path", hint=f"read it with {use}")
        if start and response.status_code != 206:
            raise UnexpectedAnswer(f"{path} is sent from its beginning, not from byte {start}")
        async with chunks_of(response) as chunks:
            yield FileReader(info, path, chunks)


async def put_file(
    http: Http,
    url: str,
    content: bytes | AsyncIterable[bytes],
    *,
    media: str,
    query: Query,
    size: int | None = None,
) -> bool:
    """Writes a file or unpacks a tar; returns whether it is new."""
    headers = {"Content-Type": media}
    if size is not None:
        headers["Content-Length"] = str(size)
    raw = content if isinstance(content, bytes) else Pieces(content)
    request = Request("PUT", url, query, headers=headers)
    async with http.stream(request, read_s=SILENCE_S, content=raw) as response:
        return response.status_code == 201


def _info(headers: Mapping[str, str]) -> FileInfo:
    mode = headers.get(_MODE, "")
    if not mode or mode.strip("01234567"):
        raise UnexpectedAnswer("the answer lacks the mode of the file")
    length = headers.get("content-length")
    directory = headers.get("content-type") == TAR
    size = int(length) if length is not None and length.isdecimal() and not directory else None
    return FileInfo(directory, int(mode, 8), size, headers.get("etag"))
