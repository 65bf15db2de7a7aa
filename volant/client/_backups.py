"""Receives backups of the daemon's database."""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ._errors import UnexpectedAnswer
from ._http import Http, chunks_of
from ._transport import Request

_SILENCE_S = 660.0
"""Longer than the daemon's limit for copying the database, ten minutes."""
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")
_NAME = re.compile(r'filename="([A-Za-z0-9._-]{1,200})"')


class Backup:
    """A backup from the daemon. `async for` yields it in pieces, once, and raises `UnexpectedAnswer` at its end if its
    length or digest is wrong."""

    def __init__(self, size: int, name: str, sha256: bytes, chunks: AsyncIterator[bytes]) -> None:
        self.size = size
        """The size in bytes."""
        self.name = name
        """A name for the file."""
        self._left = size
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        self._chunks = chunks

    def __aiter__(self) -> Backup:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await anext(self._chunks)
        except StopAsyncIteration:
            if self._left or self._hash.digest() != self._sha256:
                raise UnexpectedAnswer("the backup was cut off or changed on its way", hint="try again") from None
            raise
        self._left -= len(piece)
        self._hash.update(piece)
        return piece


@asynccontextmanager
async def open_backup(http: Http) -> AsyncIterator[Backup]:
    """Requests a backup, which the block receives."""
    async with http.stream(Request("POST", "/api/v1/system/backup"), read_s=_SILENCE_S) as response:
        digest = _DIGEST.search(response.headers.get("Repr-Digest", ""))
        name = _NAME.search(response.headers.get("Content-Disposition", ""))
        length = response.headers.get("Content-Length", "")
        if digest is None or name is None or not length.isdecimal():
            raise UnexpectedAnswer("the daemon's answer lacks the length or the digest of the backup")
        try:
            sha256 = b64decode(digest[1], validate=True)
        except binascii.Error:
            raise UnexpectedAnswer("the digest of the backup is malformed") from None
        async with chunks_of(response) as chunks:
            yield Backup(int(length), name[1], sha256, chunks)
