"""Sends a file in pieces and reads the short answer to it."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from typing import NamedTuple, TypeVar

from ._actions import Pieces
from ._errors import UnexpectedAnswer
from ._http import Http, chunks_of
from ._transport import Request, decode_json

T = TypeVar("T")

_MAX_ANSWER = 1024 * 1024


class Sent(NamedTuple):
    """The body of an upload, and how to send it."""

    content: AsyncIterable[bytes]
    size: int
    """Its length in bytes."""
    media_type: str
    read_s: float
    """How long the daemon may take to answer after the last byte, in seconds."""
    query: Mapping[str, str | None] = {}


async def send(http: Http, method: str, path: str, sent: Sent, kind: type[T]) -> T:
    """Sends a file and returns the answer, decoded as `kind`.

    :raises ClientError: the daemon refuses it, can't be reached, or answers something else
    """
    body = bytearray()
    headers = {"Content-Type": sent.media_type, "Content-Length": str(sent.size)}
    request = Request(method, path, sent.query, headers=headers)
    async with http.stream(request, read_s=sent.read_s, content=Pieces(sent.content)) as response:
        async with chunks_of(response) as chunks:
            async for piece in chunks:
                body += piece
                if len(body) > _MAX_ANSWER:
                    raise UnexpectedAnswer(f"the answer to {method} {path} is too long")
    return decode_json(bytes(body), kind, f"the answer to {method} {path}")
